"""Our classes in vLLM. The entry point `vllm.general_plugins` calls `register` in every process of vLLM; nothing else is needed:

    pip install modelwright     # into vLLM's environment
    vllm serve out/rmoe --enforce-eager

They run in vLLM's Transformers backend. Its rules (vLLM 0.32), and how our classes keep them:

- AutoModel builds the model without its head, on the meta device. RMoE and HyperMoE have such a class; LoRAMoE gets one here.
- Attention must go through transformers' attention interface: ours is the stock attention.
- Every nn.Linear is exchanged for one of vLLM's, subclasses too, and what a subclass adds is dropped. LoRAMoE's layer is an
  nn.Linear, so here it is a plain module with the same parameters. The exchanged layer also packs its weight away on a CPU, so
  a forward that reads `layer.weight`, as the hypernetwork's does, needs plain modules too.
- A block with a child named `experts` has its experts exchanged for vLLM's. The whole block is exchanged where it looks like a
  stock one; ours have more children that hold parameters, so vLLM keeps their forward and runs the experts alone.
- The forward is compiled in one piece unless enforce_eager is set. HyperMoE looks at which sets of experts occur, which
  cannot be traced.

What is refused: several pipeline stages (a router's state and the hypernetwork belong to all layers), and for LoRAMoE several
devices (its layers are not split). Then export something stock: a LoRAMoE with `merge: uniform`, a HyperMoE's Mixtral.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel

from modelwright.models import lora_moe
from modelwright.models.hyper_moe import HyperMoEConfig, HyperMoEModel
from modelwright.moe.lora import LoraMoeLinear, wrap

_BACKEND = "TransformersMoEForCausalLM"
_MIXTURES = ("RMoEForCausalLM", "HyperMoEForCausalLM")


def register() -> None:
    """Make vLLM know our classes. Called by vLLM, more than once."""
    from vllm import ModelRegistry  # vLLM is never a dependency

    for name in _MIXTURES:
        ModelRegistry.register_model(name, f"{__name__}:{_BACKEND}")
    AutoModel.register(HyperMoEConfig, ServedHyperMoE, exist_ok=True)
    for config_class, model_class in lora_moe.CLASSES.values():
        AutoModel.register(config_class, backbone(config_class), exist_ok=True)
        ModelRegistry.register_model(model_class.__name__, f"{__name__}:TransformersForCausalLM")


def __getattr__(name: str) -> Any:
    """The backend's classes, made when vLLM asks for them by the name given to its registry."""
    if name in (_BACKEND, "TransformersForCausalLM"):
        return _checked(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _checked(name: str) -> Any:
    from vllm.model_executor.models import transformers as backend

    stock: Any = getattr(backend, name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        refuse(vllm_config.model_config.hf_config, vllm_config.parallel_config)
        stock.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(name, (stock,), {"__init__": __init__, "__module__": __name__})


def refuse(config: Any, parallel: Any) -> None:
    """ValueError, with what to do instead, where a model would run split in a way that it does not allow."""
    kind = config.model_type
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(f"{kind} does not run in several pipeline stages: what all layers share would be missing; use one stage")
    if kind.startswith("lora_moe") and parallel.tensor_parallel_size > 1:
        raise ValueError(
            f"{kind} runs on one device here: its layers are not split; use one, or export it merged (tune.lora_moe with merge: uniform)"
        )


class ServedLayer(nn.Module):
    """LoraMoeLinear for inference, with the same parameters under the same names, and no nn.Linear."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_route: Tensor

    def __init__(self, layer: LoraMoeLinear):
        super().__init__()
        for name in ("weight", "bias", "lora_A", "lora_B", "lora_route"):
            self.register_parameter(name, getattr(layer, name))
        self.experts, self.r, self.scale = layer.experts, layer.r, layer.scale

    def forward(self, x: Tensor) -> Tensor:
        w = F.linear(x, self.lora_route).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        h = F.linear(x, self.lora_A).unflatten(-1, (self.experts, self.r))
        h = (h * (w * self.scale).to(h.dtype)[..., None]).flatten(-2)
        return F.linear(x, self.weight, self.bias) + F.linear(h, self.lora_B)


class PlainLinear(nn.Module):
    """A linear layer that is no nn.Linear and so keeps its weight where it is."""

    def __init__(self, layer: Any):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ServedHyperMoE(HyperMoEModel):
    """HyperMoE without its head; the hypernetwork, whose forward reads its own weights, has layers that vLLM leaves alone."""

    def __init__(self, config: HyperMoEConfig):
        super().__init__(config)
        for name, layer in list(self.hyper.named_children()):
            setattr(self.hyper, name, PlainLinear(layer))


@cache
def backbone(config_class: Any) -> Any:
    """The model without its head of a LoRAMoE config, with layers that vLLM leaves as they are."""
    name = config_class.__name__.removeprefix("LoraMoe").removesuffix("Config")
    stock: Any = getattr(transformers, f"{name}Model")

    def __init__(self, config):  # type: ignore[no-untyped-def]  # vLLM and transformers read these annotations
        stock.__init__(self, config)
        names = [n.removeprefix("model.") for n in config.lora_moe_layers or []]
        sizes = {"experts": config.lora_moe_experts, "r": config.lora_moe_r, "alpha": config.lora_moe_alpha}
        for at, layer in zip(names, wrap(self, names, **sizes), strict=True):
            self.set_submodule(at, ServedLayer(layer))

    body = {"__init__": __init__, "__annotations__": {"config": config_class}, "config_class": config_class, "__module__": __name__}
    return type(f"LoraMoe{name}Model", (stock,), body)
