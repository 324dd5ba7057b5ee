"""The role map: what every parameter of a model is for.

    anatomy = Anatomy(model)                     # any Hugging Face model; a meta-device skeleton is enough
    anatomy.parts["model.layers.0.mlp.down_proj.weight"].role      # "ffn.down"
    anatomy.ffn(0).down.read(get)                # (d, F), whatever the storage: fused, transposed or plain

Names are matched as path endings, so a new model in the style of a known one works at once; a parameter that nothing
matches, or a block without attention or feed-forward part, is an error that names it. Shapes are cross-checked.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, cat, nn

from modelwright.core.errors import UserError

# path ending (without .weight / .bias) -> role; the first match wins
_RULES = [
    (re.compile(pattern + r"$"), role)
    for pattern, role in (
        (r"(embed_tokens|wte|word_embeddings|embed_in|^shared)", "embed"),
        (r"(wpe|embed_positions|position_embeddings|relative_attention_bias)", "position"),
        (r"token_type_embeddings", "segment"),
        (r"project_in", "embed.in"),
        (r"project_out", "embed.out"),
        (r"^lm_head\.dense", "head.transform"),
        (r"^lm_head\.layer_norm", "norm.head"),
        (r"^(lm_head|embed_out|cls\.predictions(\.decoder)?|score|classifier)", "head"),
        (r"^cls\.predictions\.transform\.dense", "head.transform"),
        (r"pooler\.dense", "pooler"),
        (r"EncDecAttention\.q", "cross.q"),
        (r"EncDecAttention\.k", "cross.k"),
        (r"EncDecAttention\.v", "cross.v"),
        (r"EncDecAttention\.o", "cross.o"),
        (r"((self_attn|\.attn)\.q_proj|attention\.self\.query|SelfAttention\.q)", "attn.q"),
        (r"((self_attn|\.attn)\.k_proj|attention\.self\.key|SelfAttention\.k)", "attn.k"),
        (r"((self_attn|\.attn)\.v_proj|attention\.self\.value|SelfAttention\.v)", "attn.v"),
        (r"((self_attn|\.attn)\.(o|out)_proj|\.attn\.c_proj|attention\.(output\.)?dense|SelfAttention\.o)", "attn.o"),
        (r"(self_attn\.qkv_proj|\.attn\.c_attn|\.attention\.query_key_value)", "attn.qkv"),
        (r"(\.mlp\.gate|block_sparse_moe\.router(\.layer)?)", "router"),
        (r"\.experts\.gate_up_proj", "expert.gate_up"),
        (r"\.experts\.down_proj", "expert.down"),
        (r"shared_expert_gate", "shared.router"),
        (r"shared_experts?\.gate_proj", "shared.gate"),
        (r"shared_experts?\.up_proj", "shared.up"),
        (r"shared_mlp\.input_linear", "shared.gate_up"),
        (r"(shared_experts?\.down_proj|shared_mlp\.output_linear)", "shared.down"),
        (r"(\.mlp\.gate_proj|DenseReluDense\.wi_0)", "ffn.gate"),
        (r"\.mlp\.gate_up_proj", "ffn.gate_up"),
        (r"(\.mlp\.(up_proj|c_fc|fc_in|dense_h_to_4h)|\.fc1|DenseReluDense\.wi(_1)?|\.intermediate\.dense)", "ffn.up"),
        (r"(\.mlp\.(down_proj|c_proj|fc_out|dense_4h_to_h)|\.fc2|DenseReluDense\.wo|\.output\.dense)", "ffn.down"),
        (r"q_norm", "norm.q"),
        (r"k_norm", "norm.k"),
        (r"(input_layernorm|\.ln_1|self_attn_layer_norm|layer\.0\.layer_norm)", "norm.attn"),
        (r"(attention\.output\.LayerNorm)", "norm.attn_post"),
        (r"post_attention_layernorm", "norm.post_attention"),  # before the FFN in Llama, after attention in Gemma: settled per block
        (r"(pre_feedforward_layernorm|\.ln_2|layers\.\d+\.final_layer_norm)", "norm.ffn"),
        (r"(post_feedforward_layernorm|layer\.\d+\.output\.LayerNorm)", "norm.ffn_post"),
        (r"decoder\.block\.\d+\.layer\.1\.layer_norm", "norm.cross"),
        (r"layer\.[12]\.layer_norm", "norm.ffn"),
        (r"embeddings\.LayerNorm", "norm.embed"),
        (r"predictions\.transform\.LayerNorm", "norm.head"),
        (r"(^|\.)(norm|ln_f|final_layer_norm)", "norm.final"),
    )
]


def add_role(ending: str, role: str) -> None:
    """Make the role map know parameters whose path ends so; asked before the rules above."""
    _RULES.insert(0, (re.compile(ending + "$"), role))


_LAYER = re.compile(r"^(.*?\.?(?:layers|h|block|layer)\.(\d+))\.")
_MATMUL = ("attn", "cross", "ffn", "expert", "shared", "router", "head", "embed.in", "embed.out", "pooler")


@dataclass(frozen=True)
class Part:
    """One parameter. `rows` gives the row ranges (along the output dimension) of each piece of a fused weight."""

    name: str
    role: str
    kind: str  # weight | bias
    shape: tuple[int, ...]
    layer: int | None
    stack: str  # encoder | decoder
    orientation: str  # out_in (Linear) | in_out (Conv1D) | table | vector | experts (E, out, in)
    rows: dict[str, tuple[slice, ...]] = field(default_factory=dict)
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class View:
    """A weight as a matrix (out, in), or a bias as a vector (out), wherever and however it is stored."""

    name: str
    slices: tuple[slice, ...] = ()
    transposed: bool = False

    def read(self, get: Callable[[str], Tensor]) -> Tensor:
        """The matrix, from `get(parameter name)`. Shares memory with the source where it can."""
        tensor = get(self.name)
        tensor = tensor.T if self.transposed else tensor
        if not self.slices:
            return tensor
        pieces = [tensor[s] for s in self.slices]
        return pieces[0] if len(pieces) == 1 else cat(pieces)


@dataclass(frozen=True)
class Ffn:
    """The dense feed-forward part of one block: gate (F, d) or None, up (F, d), down (d, F); biases or None."""

    up: View
    down: View
    gate: View | None = None
    up_bias: View | None = None
    gate_bias: View | None = None
    down_bias: View | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block: its modules by name, its parts by role."""

    index: int
    stack: str
    path: str
    parts: dict[str, Part]
    module: nn.Module

    def _common(self, *families: str) -> nn.Module:
        paths = [
            p.name.removeprefix(self.path + ".").split(".")[: -1 if p.orientation == "experts" else -2]
            for p in self.parts.values()
            if p.role.startswith(families)
        ]
        shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))]
        return self.module.get_submodule(".".join(shared))

    @property
    def attention(self) -> nn.Module:
        """The smallest module that holds all of the self-attention."""
        return self._common("attn.")

    @property
    def feed_forward(self) -> nn.Module:
        """The smallest module that holds all of the feed-forward part: dense, or router with its experts."""
        return self._common("ffn.", "expert.", "router")


class Anatomy:
    """The role map of one model. Raises UserError when some part of the model is not understood."""

    def __init__(self, model: Any):
        self.model = model
        self.config: Any = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        names: dict[int, list[str]] = {}
        tensors: dict[int, nn.Parameter] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
            tensors[id(p)] = p
        self.parts: dict[str, Part] = {}
        for key, group in names.items():
            part = self._part(group, tensors[key])
            self.parts[part.name] = part
        self._settle_norms()
        self.blocks = self._blocks()
        self._check()

    def _part(self, group: list[str], p: nn.Parameter) -> Part:
        name = group[0]
        stem, _, last = name.rpartition(".")
        kind = "bias" if last == "bias" else "weight"
        path = stem if last in ("weight", "bias") else name
        role = next((role for rule, role in _RULES if rule.search(path)), None)
        if role is None:
            raise UserError(
                f"{type(self.model).__name__} has a parameter of unknown role: {name} {tuple(p.shape)}",
                "no rule of the role map matches its name",
                "add the rule to core/model/anatomy.py",
            )
        found = _LAYER.match(name)
        owner = self.model.get_submodule(stem) if last in ("weight", "bias") else None
        shape = tuple(getattr(getattr(p, "quant_state", None), "shape", p.shape))  # bitsandbytes packs a matrix into a column of bytes
        if len(shape) == 3:
            orientation = "experts"
        elif len(shape) == 1:
            orientation = "vector"
        elif isinstance(owner, nn.Embedding):
            orientation = "table"
        else:
            orientation = "in_out" if type(owner).__name__ == "Conv1D" else "out_in"
        out = shape[-1] if orientation == "in_out" or len(shape) == 1 else shape[-2]
        side = "encoder" if re.match(r"(encoder|bert)\.", name) else "decoder"
        return Part(
            name,
            role,
            kind,
            shape,
            int(found[2]) if found else None,
            side,
            orientation,
            self._rows(role, path, orientation, out),
            tuple(group[1:]),
        )

    def _rows(self, role: str, path: str, orientation: str, out: int) -> dict[str, tuple[slice, ...]]:
        c = self.config
        if role.endswith("gate_up"):
            return {"gate": (slice(0, out // 2),), "up": (slice(out // 2, out),)}
        if role != "attn.qkv":
            return {}
        heads = c.num_attention_heads
        if path.endswith("query_key_value"):  # GPT-NeoX: (head, [q k v], head_dim)
            step = out // heads // 3
            return {n: tuple(slice((3 * h + i) * step, (3 * h + i + 1) * step) for h in range(heads)) for i, n in enumerate("qkv")}
        if path.endswith("c_attn"):
            if orientation == "out_in":  # GPT-BigCode uses the name for a Linear with another layout
                raise UserError(
                    f"the fused projection {path} of {type(self.model).__name__} is of unknown layout",
                    "only GPT-2's Conv1D form of c_attn is known",
                    "add its row ranges to core/model/anatomy.py",
                )
            step = out // 3
            return {n: (slice(i * step, (i + 1) * step),) for i, n in enumerate("qkv")}
        groups = c.num_key_value_heads
        d = out // (heads + 2 * groups)
        return {"q": (slice(0, heads * d),), "k": (slice(heads * d, (heads + groups) * d),), "v": (slice((heads + groups) * d, out),)}

    def _settle_norms(self) -> None:
        # Llama's post_attention_layernorm feeds the FFN; Gemma 2/3 and OLMo 2 have one that closes the attention branch.
        sandwich = any(p.role in ("norm.ffn", "norm.ffn_post") and p.name.find("feedforward") > 0 for p in self.parts.values())
        for name, p in self.parts.items():
            if p.role == "norm.post_attention":
                self.parts[name] = replace(p, role="norm.attn_post" if sandwich else "norm.ffn")

    def _blocks(self) -> list[Block]:
        found: dict[str, dict[str, Part]] = {}
        for p in self.parts.values():
            if p.layer is not None:
                path = _LAYER.match(p.name)[1]  # type: ignore[index]
                found.setdefault(path, {})[p.role + ("" if p.kind == "weight" else ".bias")] = p
        return [
            Block(next(iter(parts.values())).layer or 0, next(iter(parts.values())).stack, path, parts, self.model.get_submodule(path))
            for path, parts in found.items()
        ]

    def _check(self) -> None:
        if not self.blocks:
            raise UserError(f"{type(self.model).__name__} has no blocks", "no parameter lies under layers.N, h.N, block.N or layer.N")
        for b in self.blocks:
            has = b.parts.keys()
            if not ({"attn.q", "attn.k", "attn.v"} <= has or "attn.qkv" in has) or "attn.o" not in has:
                raise UserError(f"the attention of {b.path} was not found", f"its parts are {', '.join(sorted(has))}")
            dense = "ffn.down" in has and ("ffn.up" in has or "ffn.gate_up" in has)
            sparse = {"router", "expert.gate_up", "expert.down"} <= has
            if not dense and not sparse:
                raise UserError(f"the feed-forward part of {b.path} was not found", f"its parts are {', '.join(sorted(has))}")
            if dense:
                up, down = self.ffn(b).up, b.parts["ffn.down"]
                inner = down.shape[0] if down.orientation == "in_out" else down.shape[1]
                if self._width(up) != inner:
                    raise UserError(
                        f"the feed-forward part of {b.path} does not fit together",
                        f"{up.name} gives {self._width(up)} units and {down.name} takes {inner}",
                    )

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts.values())

    def block(self, layer: int | Block, stack: str = "decoder") -> Block:
        """The block at an index of a stack."""
        if isinstance(layer, Block):
            return layer
        for b in self.blocks:
            if b.index == layer and (b.stack == stack or all(x.stack != stack for x in self.blocks)):
                return b
        raise UserError(f"the model has no block {layer} in its {stack}", f"it has {len(self.blocks)} blocks")

    def ffn(self, layer: int | Block, stack: str = "decoder") -> Ffn:
        """The dense feed-forward views of a block; UserError where the block is a mixture of experts."""
        b = self.block(layer, stack)
        if "ffn.down" not in b.parts:
            raise UserError(f"{b.path} has no dense feed-forward part", "it is a mixture of experts already")
        return Ffn(**{key: view for key in Ffn.__dataclass_fields__ if (view := self._view(b, key))})  # type: ignore[arg-type]

    def _view(self, b: Block, key: str) -> View | None:
        piece, suffix = (key.removesuffix("_bias"), ".bias") if key.endswith("_bias") else (key, "")
        if part := b.parts.get(f"ffn.{piece}{suffix}"):
            return View(part.name, (), part.orientation == "in_out")
        if part := b.parts.get(f"ffn.gate_up{suffix}"):
            return View(part.name, part.rows[piece], part.orientation == "in_out") if piece in part.rows else None
        return None

    def attention(self, layer: int | Block, stack: str = "decoder") -> dict[str, View]:
        """Views of q, k, v and o, and of q.bias and so on where there are biases."""
        b, views = self.block(layer, stack), {}
        for suffix in ("", ".bias"):
            if fused := b.parts.get("attn.qkv" + suffix):
                views.update({n + suffix: View(fused.name, rows, fused.orientation == "in_out") for n, rows in fused.rows.items()})
            for n in "qkvo":
                if part := b.parts.get(f"attn.{n}{suffix}"):
                    views[n + suffix] = View(part.name, (), part.orientation == "in_out")
        return views

    # ---- sizes -------------------------------------------------------------------------------------------------------
    @property
    def experts(self) -> int:
        """Routed experts per layer, 0 for a dense model."""
        return next((p.shape[0] for p in self if p.role == "expert.down"), 0)

    @property
    def top_k(self) -> int:
        """Experts per token, 0 for a dense model."""
        return int(self.config.num_experts_per_tok) if self.experts else 0

    def total(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.size for p in self)

    def active(self) -> int:
        """Parameters that one token passes through: all but the experts it is not sent to."""
        return sum(p.size * self.top_k // self.experts if p.role.startswith("expert.") else p.size for p in self)

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token that attends to `context` tokens: 2 per active matrix weight, 4 per attended q unit."""
        weights = sum(
            p.size * self.top_k // self.experts if p.orientation == "experts" else p.size
            for p in self
            if len(p.shape) > 1
            and (p.role.startswith(_MATMUL) or p.role == "embed" and any(t.startswith(("lm_head", "cls.")) for t in p.tied))
        )
        width = sum(self._width(self.attention(b)["q"]) for b in self.blocks)
        width += sum(b.parts["cross.q"].shape[0] for b in self.blocks if "cross.q" in b.parts)
        return 2 * weights + 4 * context * width

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that the decoder's self-attention cache grows by with each token (0 for an encoder)."""
        views = [self.attention(b) for b in self.blocks if b.stack == "decoder"]
        return bytes_per_value * sum(self._width(v["k"]) + self._width(v["v"]) for v in views)

    def _width(self, view: View) -> int:
        if view.slices:
            return sum(s.stop - s.start for s in view.slices)
        part = self.parts[view.name]
        return part.shape[-1] if part.orientation == "in_out" else part.shape[0]
