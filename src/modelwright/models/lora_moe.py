"""Dense models with LoRA experts in their linear layers, as transformers models: "lora_moe_llama", _mistral, _qwen2, _qwen3.

    import modelwright.models                          # registers the classes

A class is the stock one with some linear layers replaced (modelwright.moe.lora); config.json says which and how.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from modelwright.core.model.anatomy import add_role
from modelwright.moe.lora import LoraMoeLinear, merged, wrap

add_role(r"\.lora_(A|B|route)", "adapter")
_SETTINGS = {"lora_moe_layers": list[str] | None, "lora_moe_experts": int, "lora_moe_r": int, "lora_moe_alpha": float}
_DEFAULTS = {"lora_moe_layers": None, "lora_moe_experts": 6, "lora_moe_r": 4, "lora_moe_alpha": 32.0}
CLASSES: dict[str, tuple[Any, Any]] = {}  # base model_type -> config class, model class


class _LoraMoe:
    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        c = config
        wrap(self, c.lora_moe_layers or [], experts=c.lora_moe_experts, r=c.lora_moe_r, alpha=c.lora_moe_alpha)  # type: ignore[arg-type]

    @torch.no_grad()
    def _init_weights(self: Any, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, LoraMoeLinear):
            with init.guard_torch_init_functions():
                module.reset()


def _register(base: str) -> None:
    old: Any = getattr(transformers, base + "Config")
    kind = f"lora_moe_{old.model_type}"
    body = {"model_type": kind, "__annotations__": dict(_SETTINGS), "__module__": __name__}
    config = type(f"LoraMoe{base}Config", (old,), body | _DEFAULTS)
    name = f"LoraMoe{base}ForCausalLM"
    stock: Any = getattr(transformers, base + "ForCausalLM")
    model: Any = type(name, (_LoraMoe, stock), {"__annotations__": {"config": config}, "config_class": config, "__module__": __name__})
    globals().update({config.__name__: config, name: model})
    AutoConfig.register(kind, config)
    AutoModelForCausalLM.register(config, model)
    CLASSES[old.model_type] = config, model


for _base in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    _register(_base)


def unlike(model: Any) -> str:
    """Why a model's kind has no class here, or nothing."""
    return "" if model.config.model_type in CLASSES else f"only {', '.join(CLASSES)} models have a class that saves it"


def packed(model: Any, names: list[str], layer: LoraMoeLinear) -> Any:
    """A stock model whose linear layers were wrapped, as the class that saves and loads them."""
    config_class, model_class = CLASSES[model.config.model_type]
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    settings |= {
        "lora_moe_layers": names,
        "lora_moe_experts": layer.experts,
        "lora_moe_r": layer.r,
        "lora_moe_alpha": layer.scale * layer.r,
    }
    with torch.device("meta"):
        new = model_class(config_class(**settings, architectures=[model_class.__name__]))
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    for name, buffer in model.named_buffers():  # those that are not saved, such as rotary frequencies
        owner, _, last = name.rpartition(".")
        setattr(new.get_submodule(owner), last, buffer)
    return new.train(model.training)


def unwrapped(model: Any, names: list[str]) -> Any:
    """The plain model with every gate dropped and the experts merged, in place."""
    for name in names:
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight, new.bias = nn.Parameter(merged(old)), old.bias
        model.set_submodule(name, new)
    return model
