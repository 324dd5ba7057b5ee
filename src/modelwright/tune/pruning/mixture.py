"""A dense model with masks over its neurons becomes a stock mixture of experts, or a narrower dense model.

    y = W_down ((sum over e in T of g_e m_e) * h),   h = act(W_gate x) * (W_up x),   sum of g_e over T = 1

A neuron that every mask has gets the coefficient 1 for every token: it goes to the shared expert. One that no mask has goes away. Any other
one is copied to each expert whose mask has it. The result is exact for masks of 0 and 1.

Which stock class holds it: Granite-MoE-shared for models without biases on q, k and v alone (Llama, Mistral, Granite), as its shared expert
has no gate. Qwen2-MoE for Qwen2, with a shared gate of 0, which gives sigmoid 0.5, and twice the shared values. Qwen3-MoE for Qwen3, which
has no shared expert: there every expert holds the shared neurons. All three take the softmax over the chosen experts. Experts of several
sizes are filled up with neurons of zeros, which give 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Part
from modelwright.core.model.classes import config_of

_ALIKE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps use_cache tie_word_embeddings rope_parameters attention_dropout pad_token_id bos_token_id eos_token_id dtype"
).split()
_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
_DENSE = ("llama", "mistral", "qwen2", "qwen3", "granite")
_EVEN = 8  # grouped products want rows of whole 16 bytes


def require_masks(anatomy: Anatomy) -> None:
    """UserError for a model whose masked form no stock class holds."""
    kind, name = anatomy.config.model_type, type(anatomy.model).__name__
    if anatomy.experts:
        raise UserError(f"{name} is a mixture of experts already", "masks become the experts of a dense model", "give a dense checkpoint")
    if kind not in _DENSE or not name.endswith("ForCausalLM"):
        raise UserError(
            f"{name} cannot become a mixture of masks",
            f"no stock mixture of experts is shown to hold model type '{kind}' exactly",
            "give a Llama-, Mistral-, Qwen2-, Qwen3- or Granite-style language model",
        )
    ffn = anatomy.ffn(anatomy.blocks[0])
    if ffn.up_bias or ffn.gate_bias or ffn.down_bias:
        raise UserError(f"{name} cannot become a mixture of masks", "its feed-forward part has biases and no stock class's experts do")
    if "sliding_attention" in (getattr(anatomy.config, "layer_types", None) or []) or _window(anatomy.config):
        raise UserError(
            f"{name} cannot become a mixture of masks",
            "it attends through a sliding window, and the fitting classes attend to everything",
            "give a model without a window",
        )


def _window(config: Any) -> Any:
    return config.model_type == "mistral" and config.sliding_window


def narrower(model: Any, masks: Tensor, router: Tensor, top_k: int) -> Any:
    """The model with hard masks (L, E, F) and routers (L, E, d) as a stock mixture, or dense where all masks of a layer are alike."""
    anatomy = Anatomy(model)
    shared = masks.all(1)  # (L, F)
    own = masks & ~shared[:, None]
    if not bool(own.any()):
        return _dense(anatomy, shared)
    kind = _class_of(anatomy)
    if kind == "qwen3_moe":
        shared, own = torch.zeros_like(shared), masks
    sizes = _even(int(own.sum(-1).max())), _even(int(shared.sum(-1).max())) if bool(shared.any()) else 0
    target = _empty(kind, anatomy, masks.shape[1], top_k, *sizes)
    made = Anatomy(target)
    _copy_alike(anatomy, made)
    weights, to = dict(model.named_parameters()), dict(target.named_parameters())
    with torch.no_grad():
        for i, (old, new) in enumerate(zip(anatomy.blocks, made.blocks, strict=True)):
            ffn, parts = anatomy.ffn(old), new.parts
            gate, up, down = (view.read(weights.__getitem__) for view in (ffn.gate, ffn.up, ffn.down))  # type: ignore[union-attr]
            to[parts["router"].name].copy_(router[i])
            for e in range(masks.shape[1]):
                at = own[i, e].nonzero().flatten()
                to[parts["expert.gate_up"].name][e].copy_(torch.cat([_filled(gate[at], sizes[0]), _filled(up[at], sizes[0])]))
                to[parts["expert.down"].name][e].copy_(_filled(down[:, at].T, sizes[0]).T)
            if sizes[1]:
                _fill_shared(parts, to, shared[i].nonzero().flatten(), gate, up, down, sizes[1])
    return target.eval()


def _class_of(anatomy: Anatomy) -> str:
    views = anatomy.attention(anatomy.blocks[0])
    if "norm.q" in anatomy.blocks[0].parts:
        return "qwen3_moe"
    return "qwen2_moe" if "q.bias" in views and "o.bias" not in views else "granitemoeshared"


def _empty(kind: str, anatomy: Anatomy, experts: int, top_k: int, size: int, shared: int) -> Any:
    """A stock mixture of the right shape, its weights not set."""
    import transformers

    raw, biased = anatomy.config.to_dict(), "q.bias" in anatomy.attention(anatomy.blocks[0])
    head_dim = getattr(anatomy.config, "head_dim", None) or raw["hidden_size"] // raw["num_attention_heads"]
    fields = {k: raw[k] for k in _ALIKE if k in raw} | {"num_experts_per_tok": top_k, "output_router_logits": False}
    if kind == "granitemoeshared":
        name = "GraniteMoeSharedForCausalLM"
        fields |= {"num_local_experts": experts, "intermediate_size": size, "shared_intermediate_size": shared, "attention_bias": biased}
        fields |= {"attention_multiplier": head_dim**-0.5} | {m: raw[m] for m in _MULTIPLIERS if m in raw}
        if head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
            fields["head_dim"] = head_dim
    else:
        name = "Qwen2MoeForCausalLM" if kind == "qwen2_moe" else "Qwen3MoeForCausalLM"
        fields |= {"num_experts": experts, "moe_intermediate_size": size, "intermediate_size": size, "norm_topk_prob": True}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "head_dim": head_dim}
        if kind == "qwen2_moe":
            fields |= {"shared_expert_intermediate_size": max(shared, _EVEN), "qkv_bias": True}
        else:
            fields["attention_bias"] = biased
    config = config_of({"model_type": kind, "architectures": [name], **fields})
    return _blank(getattr(transformers, name), config, anatomy.model)


def _blank(cls: Any, config: Any, like: Any) -> Any:
    """A model of a class with all weights 0, in the type and place of another one."""
    kind = next(like.parameters()).dtype
    model = cls._from_config(config, dtype=kind).to(like.device)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    if like.can_generate() and like.generation_config is not None:
        model.generation_config = like.generation_config
    return model


def _copy_alike(old: Anatomy, new: Anatomy) -> None:
    """Copy what the two have in common, by role: all but the feed-forward parts. What only the new one has (biases) stays 0."""
    mine, to = dict(old.model.named_parameters()), dict(new.model.named_parameters())

    def key(part: Part) -> tuple[Any, ...]:
        return part.layer, part.role, part.kind

    source = {key(p): p.name for p in old}
    apart = ("ffn.", "expert.", "shared.", "router")
    with torch.no_grad():
        for part in new:
            if not part.role.startswith(apart) and key(part) in source:
                to[part.name].copy_(mine[source[key(part)]])
    if lost := {k for k in source if not k[1].startswith(apart)} - {key(p) for p in new}:
        raise RuntimeError(f"{type(new.model).__name__} has no place for {sorted(map(str, lost))[:3]}")


def _fill_shared(parts: dict[str, Part], to: dict[str, nn.Parameter], at: Tensor, gate: Tensor, up: Tensor, down: Tensor, n: int) -> None:
    rows = _filled(gate[at], n), _filled(up[at], n)
    columns = _filled(down[:, at].T, n).T
    if "shared.gate_up" in parts:
        to[parts["shared.gate_up"].name].copy_(torch.cat(rows))
    else:
        to[parts["shared.gate"].name].copy_(rows[0])
        to[parts["shared.up"].name].copy_(rows[1])
        columns = 2 * columns  # its gate is 0: sigmoid 0.5
    to[parts["shared.down"].name].copy_(columns)


def _dense(anatomy: Anatomy, kept: Tensor) -> Any:
    """The same class with fewer neurons."""
    model, size = anatomy.model, _even(int(kept.sum(-1).max()))
    config = type(model.config)(**{**model.config.to_dict(), "intermediate_size": size})
    made = Anatomy(_blank(type(model), config, model))
    _copy_alike(anatomy, made)
    weights, to = dict(model.named_parameters()), dict(made.model.named_parameters())
    with torch.no_grad():
        for i, (old, new) in enumerate(zip(anatomy.blocks, made.blocks, strict=True)):
            at, ffn = kept[i].nonzero().flatten(), anatomy.ffn(old)
            to[new.parts["ffn.gate"].name].copy_(_filled(ffn.gate.read(weights.__getitem__)[at], size))  # type: ignore[union-attr]
            to[new.parts["ffn.up"].name].copy_(_filled(ffn.up.read(weights.__getitem__)[at], size))
            to[new.parts["ffn.down"].name].copy_(_filled(ffn.down.read(weights.__getitem__)[:, at].T, size).T)
    return made.model.eval()


def _filled(rows: Tensor, n: int) -> Tensor:
    """Rows (m, d) and rows of zeros, n in all."""
    return torch.cat([rows, rows.new_zeros(n - len(rows), rows.shape[1])])


def _even(n: int) -> int:
    return max(_EVEN, -(-n // _EVEN) * _EVEN)
