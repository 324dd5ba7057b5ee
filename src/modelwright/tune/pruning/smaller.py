"""A model with gates on layers, heads, neurons and the width of its stream becomes a smaller model of the same class.

`Shape` says how large each kind is. Gates z that are 0 take their unit away; the others are multiplied into the weights:

    layers   z_l     rows of o_proj and down_proj, with their biases; a block whose gate is 0 goes
    heads    z_lg    columns of o_proj; the unit is a key-value head with all its queries
    ffn      z_lj    columns of down_proj
    hidden   z_j     what writes to the stream (embedding, o_proj, down_proj), and the gain of each norm that reads it

So the gates of the stream act once on every write and once after every norm, and nowhere else. Where embedding and head are one matrix,
the head gets the embedding's factor already, and the final norm keeps its gain. The official code of Sheared LLaMA leaves the embedding
out in training though its export has it, and puts the factor into the final norm and the head both; here the masked model is the exported
one. A norm's mean is over the dimensions that are left.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Part

KINDS = ("layers", "heads", "ffn", "hidden")
_FIT = ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma")
_ROLES = {  # what the rows and the columns of a matrix are, None: neither is cut
    "attn.q": ("q", "hidden"),
    "attn.k": ("kv", "hidden"),
    "attn.v": ("kv", "hidden"),
    "attn.o": ("hidden", "q"),
    "ffn.gate": ("ffn", "hidden"),
    "ffn.up": ("ffn", "hidden"),
    "ffn.down": ("hidden", "ffn"),
    "embed": (None, "hidden"),
    "head": (None, "hidden"),
    "norm.attn": ("hidden", None),
    "norm.ffn": ("hidden", None),
    "norm.final": ("hidden", None),
}


@dataclass(frozen=True)
class Shape:
    """Blocks, key-value heads, neurons per block, width of the stream; queries per key-value head and head width stay."""

    layers: int
    heads: int
    ffn: int
    hidden: int
    queries: int
    head_dim: int

    @staticmethod
    def of(config: Any) -> "Shape":
        kv = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(config.num_hidden_layers, kv, config.intermediate_size, config.hidden_size, config.num_attention_heads // kv, head_dim)

    def gates(self, kind: str) -> tuple[int, ...]:
        """The shape of the gates of one kind."""
        n = getattr(self, kind)
        return (n,) if kind in ("layers", "hidden") else (self.layers, n)


def require_fit(anatomy: Anatomy, kinds: set[str]) -> None:
    """UserError for a model that cannot be cut in these ways."""
    kind, name = anatomy.config.model_type, type(anatomy.model).__name__
    if anatomy.experts:
        raise UserError(f"{name} is a mixture of experts", "only dense models are made smaller here", "give a dense model")
    if kind not in _FIT or not name.endswith("ForCausalLM"):
        raise UserError(
            f"{name} cannot be made smaller",
            f"model type '{kind}' has norms with means, fused projections or norms after its branches",
            "give a Llama-, Mistral-, Qwen2-, Qwen3-, Granite- or Gemma-style language model",
        )
    if kind == "gemma" and "hidden" in kinds:
        raise UserError(
            f"the width of {name} cannot be made smaller", "it scales its embeddings by the root of its width", "leave hidden out"
        )


class _Cut:
    """Indices and factors of one block, or of what stands outside the blocks."""

    def __init__(self, gates: dict[str, Tensor], layer: int | None, shape: Shape):
        heads = gates["heads"][layer] if layer is not None else gates["heads"][0]
        ffn = gates["ffn"][layer] if layer is not None else gates["ffn"][0]
        self.values = {
            "hidden": gates["hidden"],
            "kv": heads.repeat_interleave(shape.head_dim),
            "q": heads.repeat_interleave(shape.queries * shape.head_dim),
            "ffn": ffn,
        }
        self.at = {k: v.nonzero().flatten() for k, v in self.values.items()}
        self.layer = gates["layers"][layer] if layer is not None else torch.ones((), device=heads.device)

    def __call__(self, part: Part, t: Tensor, gain: Any, tied: bool) -> Tensor:
        """A parameter with its units taken out and the gates multiplied in."""
        rows, columns = _ROLES.get(part.role, (None, None))
        out = t.float()
        if part.role.startswith("norm.") and rows and not (tied and part.role == "norm.final"):
            out = (out + gain) * self.values["hidden"] - gain
        if part.role in ("attn.o", "ffn.down"):
            factor = self.layer * self.values["hidden"]
            out = out * (factor[:, None] if out.dim() == 2 else factor)
            if out.dim() == 2:
                out = out * self.values[columns]  # type: ignore[index]
        if part.role == "embed":
            out = out * self.values["hidden"]
        if rows:
            out = out[self.at[rows]]
        if columns and out.dim() == 2:
            out = out[:, self.at[columns]]
        return out.to(t.dtype)


def smaller(model: Any, gates: dict[str, Tensor]) -> Any:
    """The model that the gates leave; every row of gates has as many that are not 0."""
    anatomy, shape = Anatomy(model), Shape.of(model.config)
    whole = {k: torch.ones(shape.gates(k), device=model.device) for k in KINDS} | gates
    layers = whole["layers"].nonzero().flatten().tolist()
    counts = {k: int((whole[k][layers] if whole[k].dim() > 1 else whole[k]).count_nonzero(-1).max()) for k in KINDS}
    made = _empty(model, shape, counts, layers)
    to, new = dict(made.named_parameters()), Anatomy(made)
    tied = any(p.role == "embed" and p.tied for p in anatomy)
    weights = dict(model.named_parameters())
    place = {(p.layer, p.role, p.kind): p.name for p in new}
    with torch.no_grad():
        for part in anatomy:
            if part.layer is not None and part.layer not in layers:
                continue
            cut = _Cut(whole, part.layer, shape)
            name = place[None if part.layer is None else layers.index(part.layer), part.role, part.kind]
            to[name].copy_(cut(part, weights[part.name], _gain(model, part), tied))
    return made.eval()


def _gain(model: Any, part: Part) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma."""
    if not part.role.startswith("norm."):
        return 0.0
    norm = model.get_submodule(part.name.removesuffix(".weight"))
    kept = norm.weight.data
    norm.weight.data = torch.zeros_like(kept)
    with torch.no_grad():
        found = float(norm(torch.ones(1, 1, len(kept), dtype=kept.dtype, device=kept.device)).float().mean())
    norm.weight.data = kept
    return float(round(found))


def _empty(model: Any, shape: Shape, counts: dict[str, int], layers: list[int]) -> Any:
    raw = model.config.to_dict()
    raw |= {
        "num_hidden_layers": len(layers),
        "hidden_size": counts["hidden"],
        "intermediate_size": counts["ffn"],
        "num_key_value_heads": counts["heads"],
        "num_attention_heads": counts["heads"] * shape.queries,
        "head_dim": shape.head_dim,
    }
    if raw.get("layer_types"):
        raw["layer_types"] = [raw["layer_types"][i] for i in layers]
    if model.config.model_type == "granite" and shape.head_dim * raw["num_attention_heads"] == raw["hidden_size"]:
        raw.pop("head_dim")
    kind: nn.Parameter = next(model.parameters())
    made = type(model)._from_config(type(model.config)(**raw), dtype=kind.dtype).to(kind.device)
    if model.generation_config is not None:
        made.generation_config = model.generation_config
    return made
