"""HyperMoE as a transformers model: Mixtral with a generated adapter beside the experts (modelwright.moe.hyper), "hyper_moe".

import modelwright.models                          # registers the class
model = AutoModelForCausalLM.from_pretrained(folder).eval().precompute()     # adapters made once, for inference
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import initialization as init
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralDecoderLayer, MixtralExperts, MixtralModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder

from modelwright.core.model.anatomy import add_role
from modelwright.models.causal import Balanced
from modelwright.moe.hyper import Adapters, HyperNetwork, SetCode, adapt, table

add_role(r"\.mlp\.code\.(embedding|process\.\d)", "hyper.code")
add_role(r"\.hyper\.\w+", "hyper")


class HyperMoEConfig(MixtralConfig):
    """MixtralConfig with the sizes of the hypernetwork."""

    model_type = "hyper_moe"
    norm_topk_prob: bool = True
    hyper_expert_embedding: int = 128
    hyper_process: int = 128
    hyper_code: int = 128
    hyper_layer_embedding: int = 10
    hyper_bottleneck: int = 128
    hyper_adapter: int = 64
    hyper_init: str = "paper"


_TABLE = ("table_down", "table_down_bias", "table_up", "table_up_bias", "table_number")


class HyperBlock(nn.Module):
    """Router, experts, and the adapter of the token's expert set."""

    def __init__(self, config: HyperMoEConfig, hyper: HyperNetwork, layer: int):
        super().__init__()
        c = config
        self.gate, self.experts = Qwen2MoeTopKRouter(config), MixtralExperts(config)
        self.code = SetCode(c.num_local_experts, e=c.hyper_expert_embedding, hidden=c.hyper_process, q=c.hyper_code)
        self.k, self.layer, self._hyper = c.num_experts_per_tok, layer, (hyper,)  # in a tuple: the model owns it
        self.keep(None)
        self.register_load_state_dict_post_hook(_outdated)

    def keep(self, found: tuple[Adapters, Tensor] | None) -> None:
        """Use these adapters in evaluation mode, or none. Buffers, so that they change device and type with the model."""
        made = (None,) * 5 if found is None else (*vars(found[0]).values(), found[1])
        for name, value in zip(_TABLE, made, strict=True):
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> "HyperBlock":
        if mode:
            self.keep(None)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, index = self.gate(flat)
        y = self.experts(flat, index, weights)
        *generated, number = (getattr(self, name) for name in _TABLE)
        if number is None or self.training:
            return (y + adapt(flat, index, self.code, self._hyper[0], self.layer)).view_as(x)
        return (y + Adapters(*generated)(flat, number[tuple(index.T)])).view_as(x)


def _outdated(block: HyperBlock, keys: Any) -> None:
    block.keep(None)


class _Initialised:
    config: HyperMoEConfig
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": MixtralDecoderLayer,
        "attentions": MixtralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        with init.guard_torch_init_functions():  # loaded weights are left alone
            if isinstance(module, Qwen2MoeTopKRouter):
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            elif isinstance(module, SetCode):
                init.normal_(module.embedding, mean=0.0, std=1.0)
                for linear in (m for m in module.process if isinstance(m, nn.Linear)):
                    linear.reset_parameters()  # at transformers' 0.02 all sets of experts would have nearly the same code
            elif isinstance(module, HyperNetwork):
                init.normal_(module.layer_embedding, mean=0.0, std=1.0)
                module.mix.reset_parameters()
                module.reset(self.config.hyper_init)  # type: ignore[arg-type]


class HyperMoEModel(_Initialised, MixtralModel):  # type: ignore[misc]
    config: HyperMoEConfig

    def __init__(self, config: HyperMoEConfig):
        super().__init__(config)
        c = config
        sizes = {"a": c.hyper_adapter, "b": c.hyper_bottleneck, "q": c.hyper_code, "c": c.hyper_layer_embedding}
        self.hyper = HyperNetwork(c.hidden_size, c.num_hidden_layers, **sizes)
        for i, layer in enumerate(self.layers):
            layer.mlp = HyperBlock(config, self.hyper, i)
        self.post_init()


class HyperMoEForCausalLM(Balanced, _Initialised, MixtralForCausalLM):  # type: ignore[misc]
    config: HyperMoEConfig

    def __init__(self, config: HyperMoEConfig):
        super().__init__(config)
        self.model = HyperMoEModel(config)
        self.post_init()

    def precompute(self, on: bool = True) -> "HyperMoEForCausalLM":
        """Make every set's adapter now, for evaluation mode; `on=False` drops them, as do training mode and loading."""
        for i, layer in enumerate(self.model.layers):
            layer.mlp.keep(table(layer.mlp.code, self.model.hyper, i, layer.mlp.k) if on else None)
        return self


AutoConfig.register("hyper_moe", HyperMoEConfig)
AutoModel.register(HyperMoEConfig, HyperMoEModel)
AutoModelForCausalLM.register(HyperMoEConfig, HyperMoEForCausalLM)
