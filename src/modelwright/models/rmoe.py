"""RMoE as a transformers model: Mixtral's blocks with recurrent routers (modelwright.moe.rmoe), registered as "rmoe".

    import modelwright.models.rmoe                     # registers the class
    AutoModelForCausalLM.from_pretrained(folder)

config.json holds every setting. `dense_layers` have a plain feed-forward part; the routers' state passes them unchanged.
With labels and output_router_logits the balance loss is the mean over layers of the per-layer Switch loss, padding excluded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, MixtralConfig
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralExperts,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from modelwright.core.model.anatomy import add_role
from modelwright.models.causal import Balanced, Routed
from modelwright.moe.rmoe import RecurrentRouter, RouterCell

add_role(r"\.mlp\.gate\.project", "router.project")
add_role(r"\.router_cell\.core\.(weight|bias)_[ih]h", "router.cell")


class RMoEConfig(MixtralConfig):
    """MixtralConfig with the settings of the routers."""

    model_type = "rmoe"
    router_width: int = 128
    router_cell: str = "gru"
    router_passing: str = "full"
    router_residual: float = 0.0
    dense_layers: list[int] | None = None
    mlp_bias: bool = False


class RMoEBlock(nn.Module):
    def __init__(self, config: RMoEConfig):
        super().__init__()
        c = config
        self.gate = RecurrentRouter(
            c.hidden_size,
            c.router_width,
            c.num_local_experts,
            c.num_experts_per_tok,
            c.router_passing,  # type: ignore[arg-type]
            c.router_residual,
        )
        self.experts = MixtralExperts(config)

    def forward(self, x: Tensor, state: Tensor | None, cell: RouterCell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, the routers' state, logits, chosen experts."""
        flat = x.reshape(-1, x.shape[-1])
        logits, weights, index, state = self.gate(flat, self.gate.begin(flat, cell) if state is None else state, cell)
        return self.experts(flat, index, weights).view_as(x), state, logits, index


class RMoELayer(GradientCheckpointingLayer):
    """A decoder layer; the state of the routers comes in and goes out, so recomputing it is exact."""

    def __init__(self, config: RMoEConfig, layer: int):
        super().__init__()
        self.self_attn = MixtralAttention(config, layer)
        self.mlp = LlamaMLP(config) if layer in (config.dense_layers or []) else RMoEBlock(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, state: Tensor | None, cell: RouterCell, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any, Any]:
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, LlamaMLP):
            return x + self.mlp(y), state, None, None
        y, state, logits, index = self.mlp(y, state, cell)
        return x + y, state, logits, index


class RMoEPreTrainedModel(MixtralPreTrainedModel):
    config: RMoEConfig
    _no_split_modules = ["RMoELayer"]
    _can_compile_fullgraph = False
    _can_record_outputs = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentRouter):
            init.normal_(module.weight, mean=0.0, std=0.02)
        elif isinstance(module, RouterCell):  # as torch; the official weights stayed uninitialised
            for p in module.parameters():
                init.uniform_(p, -(module.p**-0.5), module.p**-0.5)


class RMoEModel(RMoEPreTrainedModel):
    def __init__(self, config: RMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RMoELayer(config, i) for i in range(config.num_hidden_layers)])
        self.router_cell = RouterCell(config.router_width, config.router_cell)  # type: ignore[arg-type]
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Routed:
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + past)[None]
        make = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        rope = self.rotary_emb(x, position_ids=position_ids)
        state, routed, hidden = None, [], [x]
        for layer in self.layers:
            x, state, logits, index = layer(
                x,
                state,
                self.router_cell,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rope,
                **kwargs,
            )
            routed += [] if logits is None else [(logits, index)]
            hidden.append(x)
        x = self.norm(x)
        return Routed(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden[:-1], x) if output_hidden_states else None,  # type: ignore[arg-type]
            router_logits=tuple(logits for logits, _ in routed),  # type: ignore[arg-type]
            router_index=tuple(index for _, index in routed),
        )


class RMoEForCausalLM(Balanced, RMoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RMoEConfig):
        super().__init__(config)
        self.model = RMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("rmoe", RMoEConfig)
AutoModel.register(RMoEConfig, RMoEModel)
AutoModelForCausalLM.register(RMoEConfig, RMoEForCausalLM)
