"""Which stock mixture-of-experts class holds a dense model exactly, and how that class names its tensors on disk.

Measured (fp32, identical experts): Llama and Mistral in Mixtral, Qwen2 in Qwen2-MoE, Qwen3 in Qwen3-MoE, Granite and
Llama with attention biases in Granite-MoE, Phi-3 in Mixtral after splitting its fused projections: 3e-7 to 5e-7.
Three things break equality without an error and are always copied: rope_parameters (Mixtral's default theta is 1e6,
Llama's 1e4), the sliding window, and norm_topk_prob, which must be true.
vLLM's Qwen2-MoE always has biases on q, k and v and leaves them unset, without a word, where the folder has none: a source
without them gets zeros there, which transformers adds exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.classes import config_of, disk_shapes

_SHARED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act max_position_embeddings "
    "initializer_range rms_norm_eps use_cache tie_word_embeddings rope_parameters attention_dropout "
    "pad_token_id bos_token_id eos_token_id"
).split()
_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


@dataclass(frozen=True)
class Target:
    """A stock class: its config, and where its router and experts lie on disk (`fused`: one tensor for all experts)."""

    model_type: str
    config: Any
    moe: str  # path of the sparse block below a layer
    router: str
    expert: tuple[str, ...]  # gate, up, down with {e}, or fused gate_up and down
    shared: int = 0  # neurons of the shared expert

    @property
    def fused(self) -> bool:
        return len(self.expert) == 2

    def pieces(self, layer: str, e: int, gate: Tensor, up: Tensor, down: Tensor) -> Iterator[Any]:
        """Stream pieces of one expert: gate, up (F, d), down (d, F)."""
        at = f"{layer}.{self.moe}."
        if self.fused:
            yield at + self.expert[0], torch.cat([gate, up]), e
            yield at + self.expert[1], down, e
            return
        for name, tensor in zip(self.expert, (gate, up, down), strict=True):
            yield at + name.format(e=e), tensor

    def names(self, layer: str, experts: int) -> list[str]:
        """Disk names of one layer's router and experts."""
        at = f"{layer}.{self.moe}."
        each = [n.format(e=e) for e in range(experts) for n in self.expert] if not self.fused else list(self.expert)
        return [at + n for n in [self.router, *each]]

    def biases(self) -> dict[str, tuple[int, ...]]:
        """Disk name and shape of each bias on q, k and v that the class has."""
        return {n: s for n, s in disk_shapes(self.config).items() if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}


_LAYOUTS = {
    "mixtral": (
        "MixtralForCausalLM",
        "block_sparse_moe",
        "gate.weight",
        ("experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight"),
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "mlp",
        "gate.weight",
        ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "mlp",
        "gate.weight",
        ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"),
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "block_sparse_moe", "router.layer.weight", ("input_linear.weight", "output_linear.weight")),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        "block_sparse_moe",
        "router.layer.weight",
        ("input_linear.weight", "output_linear.weight"),
    ),
}


def choose(source: Checkpoint, anatomy: Anatomy, experts: int, top_k: int, wanted: str = "auto") -> Target:
    """The stock class for `source`, or a UserError that says why none is exact."""
    c, kind = source.hf_config, source.config["model_type"]
    _refuse(anatomy, kind)
    views = anatomy.attention(anatomy.blocks[0])
    qkv_bias, o_bias = "q.bias" in views, "o.bias" in views
    qk_norm = "norm.q" in anatomy.blocks[0].parts
    multiplied = kind == "granite"
    exact = []
    if not (qkv_bias or qk_norm or multiplied):
        exact = ["mixtral", "qwen2_moe", "granitemoe", "granitemoeshared"]
    elif qk_norm:
        exact = ["qwen3_moe"]
    elif qkv_bias and not o_bias and not multiplied:
        exact = ["qwen2_moe"]
    else:
        exact = ["granitemoe", "granitemoeshared"]
    window, mixed = _window(c)
    if mixed:
        exact = [t for t in exact if t == "qwen2_moe"]
    elif window:
        exact = [t for t in exact if t in ("mixtral", "qwen2_moe", "qwen3_moe")]
    if not exact:
        raise UserError(
            f"no stock class holds this {kind} model exactly",
            "it uses a sliding window together with " + ("biases" if qkv_bias else "q and k norms" if qk_norm else "its layer pattern"),
        )
    if wanted not in ("auto", *exact):
        raise UserError(
            f"target={wanted} does not hold this {kind} model exactly", f"exact are: {', '.join(exact)}", "leave target at auto"
        )
    model_type = exact[0] if wanted == "auto" else wanted
    return _target(model_type, c, views, experts, top_k, window, mixed)


def _refuse(anatomy: Anatomy, kind: str) -> None:
    name = type(anatomy.model).__name__
    if anatomy.experts:
        raise UserError(f"{name} is a mixture of experts already", how="give a dense checkpoint")
    ffn, roles = anatomy.ffn(anatomy.blocks[0]), {p.role for p in anatomy}
    if any(b.stack == "encoder" for b in anatomy.blocks):
        raise UserError(f"{name} has an encoder", "no stock mixture-of-experts class has one with these layers", "give a decoder")
    if ffn.gate is None:
        biased = " and its experts would need biases" if ffn.up_bias else ""
        raise UserError(
            f"{name} cannot become a stock mixture of experts",
            f"its feed-forward part has no gate{biased}, and every stock class has gated experts without biases",
            "give a Llama-, Mistral-, Qwen-, Granite- or Phi-3-style model",
        )
    if ffn.up_bias or ffn.gate_bias or ffn.down_bias:
        raise UserError(
            f"{name} cannot become a stock mixture of experts", "its feed-forward part has biases and no stock class's experts do"
        )
    if {"norm.attn_post", "norm.ffn_post"} & roles:
        raise UserError(
            f"{name} cannot become a stock mixture of experts",
            "it norms what attention or the feed-forward part gives, and no stock class does",
        )
    if not name.endswith("ForCausalLM"):
        raise UserError(
            f"{name} is no language model", "it has no head that predicts tokens", "give the causal language model of this family"
        )
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3"):
        raise UserError(
            f"{name} cannot become a stock mixture of experts",
            f"no stock class is shown to hold model type '{kind}' exactly",
            "give a Llama-, Mistral-, Qwen-, Granite- or Phi-3-style model",
        )
    if (rope := getattr(anatomy.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{name} cannot become a stock mixture of experts",
            f"it rotates only a share of {rope['partial_rotary_factor']} of each head, and the fitting classes rotate all of it",
        )


def _window(c: Any) -> tuple[int | None, bool]:
    """The sliding window where every layer has one, and whether only some layers do."""
    types = set(getattr(c, "layer_types", None) or [])
    if types and "sliding_attention" not in types:
        return None, False
    window = getattr(c, "sliding_window", None) or None
    return window, len(types) > 1


def _target(model_type: str, c: Any, views: dict[str, Any], experts: int, top_k: int, window: int | None, mixed: bool) -> Target:
    cls, moe, router, expert = _LAYOUTS[model_type]
    raw = c.to_dict()
    fields = {k: raw[k] for k in _SHARED if k in raw}
    width = c.intermediate_size
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shared = 0
    fields |= {"num_experts_per_tok": top_k, "architectures": [cls], "dtype": raw.get("dtype"), "head_dim": head_dim}
    if model_type == "mixtral":
        fields |= {"num_local_experts": experts, "intermediate_size": width, "sliding_window": window}
    elif model_type.startswith("qwen"):
        fields |= {
            "num_experts": experts,
            "moe_intermediate_size": width,
            "intermediate_size": width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": bool(window),
            "sliding_window": window,
        }
        if model_type == "qwen2_moe":
            shared = min(128, width)  # the class wants one; its down_proj starts at zero, so it is silent until trained
            fields |= {"shared_expert_intermediate_size": shared, "qkv_bias": True}
            types = ["sliding_attention" if window else "full_attention"] * c.num_hidden_layers
            fields |= {"layer_types": raw["layer_types"] if mixed else types}
        else:
            fields |= {"attention_bias": "q.bias" in views}
    else:
        fields |= {"num_local_experts": experts, "intermediate_size": width, "attention_bias": "q.bias" in views}
        fields |= {m: getattr(c, m, 1.0) for m in _MULTIPLIERS}
        fields |= {} if hasattr(c, "attention_multiplier") else {"attention_multiplier": head_dim**-0.5}
        fields |= {"shared_intermediate_size": 0} if model_type == "granitemoeshared" else {}
        if head_dim * c.num_attention_heads == c.hidden_size:
            del fields["head_dim"]  # vLLM derives it
    return Target(model_type, config_of({"model_type": model_type, **fields}), moe, router, expert, shared)
