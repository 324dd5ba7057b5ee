"""Mix-LN (arXiv 2412.13795): a Llama whose norms stand in a place of their own in each block, registered as "mix_ln".

    import modelwright.models                          # registers the class
    AutoModelForCausalLM.from_pretrained(folder)

    pre      x = x + attention(norm(x)),   x = x + ffn(norm(x))         Llama
    post     x = norm(x + attention(x)),   x = norm(x + ffn(x))         the first Transformer
    output   x = x + norm(attention(x)),   x = x + norm(ffn(x))         OLMo 2; not the same as post

Mix-LN makes the first share alpha of the blocks post and the others pre, so that gradients do not die out in the deep blocks. The final
norm stays. There are as many parameters as in Llama, under the same names. `norm_placement` in config.json holds one word per block; the
official code takes the placement from environment variables, so that its models load as something else where they are not set.
It is a way to train from nothing: a Llama that was trained with pre cannot become another. vLLM cannot serve it.

Rounding of alpha * L is ours: to the nearest, and at least one block where alpha is above 0. The paper takes 3 of 12, 6 of 24, and 2 of
32 blocks at 7B with a long warm-up (10k of 150k steps); a deep model with a short warm-up was reported unstable.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

PLACEMENTS = ("pre", "post", "output")


class MixLNConfig(LlamaConfig):
    """LlamaConfig with the place of the norms of each block; empty: pre everywhere."""

    model_type = "mix_ln"
    norm_placement: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.norm_placement = list(self.norm_placement or ["pre"] * self.num_hidden_layers)
        if len(self.norm_placement) != self.num_hidden_layers or set(self.norm_placement) - set(PLACEMENTS):
            raise ValueError(f"norm_placement needs one of {', '.join(PLACEMENTS)} for each of {self.num_hidden_layers} blocks")


def placements(layers: int, norm: str, alpha: float) -> list[str]:
    """The place of the norms of each block: one of PLACEMENTS everywhere, or `mix`."""
    if norm != "mix":
        return [norm] * layers
    post = max(1, int(alpha * layers + 0.5)) if alpha > 0 else 0
    return ["post"] * post + ["pre"] * (layers - post)


class MixLNLayer(LlamaDecoderLayer):
    """A Llama block whose two norms stand where `norm_placement` says."""

    def __init__(self, config: MixLNConfig, layer: int):
        super().__init__(config, layer)
        assert config.norm_placement is not None
        self.placement = config.norm_placement[layer]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.placement == "pre":
            return super().forward(hidden_states, **kwargs)
        x, first, second = hidden_states, self.input_layernorm, self.post_attention_layernorm
        attended = self.self_attn(hidden_states=x, **kwargs)[0]
        if self.placement == "post":
            x = first(x + attended)
            return second(x + self.mlp(x))
        x = x + first(attended)
        return x + second(self.mlp(x))


class MixLNPreTrainedModel(LlamaPreTrainedModel):
    config: MixLNConfig
    _no_split_modules = ["MixLNLayer"]


class MixLNModel(MixLNPreTrainedModel, LlamaModel):
    def __init__(self, config: MixLNConfig):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel's own would make its blocks first, and draw their weights
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MixLNLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MixLNForCausalLM(MixLNPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: MixLNConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MixLNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("mix_ln", MixLNConfig)
AutoModel.register(MixLNConfig, MixLNModel)
AutoModelForCausalLM.register(MixLNConfig, MixLNForCausalLM)
