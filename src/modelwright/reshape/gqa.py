"""Fewer key and value heads without training: a smaller KV cache at once, a head start where training follows.

When to use it: a model with many key and value heads is to serve long texts. The cache shrinks by the same factor. Much is lost right
away; GQA (2305.13245) trains on for 5 % of the pre-training tokens. The result is a stock class with a smaller num_key_value_heads.

Heads are merged in groups of neighbours; the queries of a group share the merged head, biases are merged alike.
- mean: the heads' mean (GQA, 2305.13245).
- first: the first head of each group.
- aligned: the heads are turned towards each other first, then averaged, then scaled to their mean size (2412.20677). The turns do not
  change the model: any rotation for values, RoPE-commuting ones for keys, found on activations of a text (growth/align.py). Raw heads of a
  trained model are nearly orthogonal, so that their plain mean is small and attention becomes uniform.

Measured on stories260K, 4 heads to 2, loss on the probe text before 3.02 and right after: mean 5.56, first 5.30, aligned 3.30 where
the heads were turned by Shakespeare, 3.69 where they were turned by one sentence over and over.

Where a q- or k-norm scales the two halves of a frequency pair differently (Qwen3), keys cannot be turned; values still are, and the report
says so. The same holds for models that rotate a part of each head only. Grouping by search, uneven numbers of heads and fusion with
training are DHA's: tune.dha. Without data the probe text of the certificates is used; give text like that which is served.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.anatomy import Anatomy, Block
from modelwright.core.model.certificate import probe_ids
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.hooks import capture
from modelwright.core.model.writer import Blueprint
from modelwright.reshape.growth.align import agreement, blocks, phases, rotations, turn_matrix, turn_pairs
from modelwright.reshape.growth.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Knobs:
    kv_heads: int = knob(help="key and value heads afterwards; must divide those of the model", low=1)
    method: Literal["mean", "first", "aligned"] = knob("aligned", "how the heads of a group become one")
    data: Data = knob(Data(), "aligned: text whose activations the heads are turned by; empty: the probe text")
    tokens: int = knob(16_384, "aligned: tokens of it, at most", low=16)
    context: int = knob(256, "aligned: tokens per row", low=2)


@dataclass(frozen=True)
class Merge:
    """How the heads of one group become one: turns (n, d, d) for values, angles (n, d / 2) for keys, factors of the means."""

    values: Tensor | None = None
    keys: Tensor | None = None
    value_scale: float = 1.0
    key_scale: float = 1.0


def gqa(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Blueprint, str]:
    """The checkpoint with fewer key and value heads, as a blueprint."""
    anatomy = Anatomy(source.skeleton)
    sizes = _checked(source, anatomy, knobs)
    members = sizes.kv // knobs.kv_heads
    merges: dict[tuple[int, int], Merge] = {}
    facts: dict[str, Any] = {"method": knobs.method, "key and value heads": f"{sizes.kv} -> {knobs.kv_heads}"}
    if knobs.method == "aligned":
        merges, found = _align(source, anatomy, sizes, members, knobs)
        facts |= found

    def stream() -> Iterator[tuple[str, Tensor]]:
        changed: dict[str, tuple[Block, str]] = {}
        for b in anatomy.blocks:
            for n in "qkvo":
                for suffix in ("", ".bias"):
                    if part := b.parts.get(f"attn.{n}{suffix}"):
                        changed[part.name] = (b, n + suffix)
        for name in source.table:
            if name not in changed:
                yield name, source.get(name)
                continue
            b, which = changed[name]
            groups = [merges.get((b.index, g), Merge()) for g in range(knobs.kv_heads)]
            tensor = source.get(name)
            yield name, _merged(tensor.float(), which, groups, sizes, members, knobs.method).to(tensor.dtype).contiguous()

    config = source.config | {"num_key_value_heads": knobs.kv_heads}
    dtypes = {n: source.dtype(n) for n in source.table}
    return Blueprint(config, dtypes, stream, source, facts), "changed function"


def _checked(source: Checkpoint, anatomy: Anatomy, knobs: Knobs) -> Sizes:
    config, name = source.hf_config, type(source.skeleton).__name__
    roles = {p.role for p in anatomy}
    if config.is_encoder_decoder or "attn.qkv" in roles or not hasattr(config, "num_key_value_heads"):
        why = "its query, key and value projections are one matrix" if "attn.qkv" in roles else "its class has no number of key heads"
        raise UserError(f"{name} cannot have fewer key and value heads", why, "give a Llama-, Mistral- or Qwen-style model")
    sizes = sizes_of(config)
    if wide := [p for p in anatomy if p.role == "norm.k" and p.shape != (sizes.head_dim,)]:
        raise UserError(
            f"{name} cannot have fewer key and value heads", f"{wide[0].name} norms all key heads together", "give another model"
        )
    if sizes.kv % knobs.kv_heads or knobs.kv_heads >= sizes.kv:
        fit = [str(k) for k in range(1, sizes.kv) if sizes.kv % k == 0]
        raise UserError(
            f"kv_heads={knobs.kv_heads} does not fit",
            f"the model has {sizes.kv} key and value heads, which are merged in groups of one size",
            f"give {' or '.join(fit)}" if fit else "the model has no more to give",
        )
    return sizes


def _merged(t: Tensor, which: str, groups: list[Merge], sizes: Sizes, members: int, method: str) -> Tensor:
    """A tensor of the attention with merged heads; rows of a head lie together in q, k and v, its columns in o."""
    d, kind = sizes.head_dim, which[0]
    if kind == "o":
        if which != "o":
            return t
        heads = list(t.split(d, 1))  # query heads
        for h in range(len(heads)):
            m = groups[h // (sizes.group * members)]
            if m.values is not None:
                heads[h] = heads[h] @ m.values[h // sizes.group % members].float()
        return torch.cat(heads, 1)
    heads = list(t.split(d))
    if kind == "q":
        for h in range(len(heads)):
            m = groups[h // (sizes.group * members)]
            if m.keys is not None:
                heads[h] = turn_pairs(heads[h], m.keys[h // sizes.group % members])
        return torch.cat(heads)
    merged = []
    for g, m in enumerate(groups):
        own = heads[g * members : (g + 1) * members]
        if method == "first":
            merged.append(own[0])
            continue
        if kind == "v" and m.values is not None:
            own = [r.T.float() @ x for r, x in zip(m.values, own, strict=True)]
        if kind == "k" and m.keys is not None:
            own = [turn_pairs(x, a) for a, x in zip(m.keys, own, strict=True)]
        merged.append(sum(own[1:], own[0]) / members * (m.value_scale if kind == "v" else m.key_scale))
    return torch.cat(merged)


# ---- alignment -------------------------------------------------------------------------------------------------------
_HALF_ROPE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "gemma",
    "gemma2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "mix_ln",
)


def _align(
    source: Checkpoint, anatomy: Anatomy, sizes: Sizes, members: int, knobs: Knobs
) -> tuple[dict[tuple[int, int], Merge], dict[str, Any]]:
    """The turns of every group of every block, and how alike the heads were before and after."""
    why = _keys_stay(source, anatomy)
    grams, tokens = _grams(source, knobs)
    found: dict[tuple[int, int], Merge] = {}
    alike: dict[str, list[float]] = {n: [] for n in ("keys", "keys turned", "values", "values turned")}
    for b in anatomy.blocks:
        for g in range(sizes.kv // members):
            heads = list(range(g * members, (g + 1) * members))
            k, v = (blocks(grams[b.index, n], heads, sizes.head_dim) for n in "kv")
            turned = rotations(v)
            angles = None if why else phases(k)
            matrix = None if angles is None else torch.stack([turn_matrix(a) for a in angles])
            (kept_v, scale_v), (kept_k, scale_k) = agreement(v, turned), agreement(k, matrix)
            found[b.index, g] = Merge(turned, angles, scale_v, scale_k)
            for name, value in zip(alike, (agreement(k)[0], kept_k, agreement(v)[0], kept_v), strict=True):
                alike[name].append(value)
    facts: dict[str, Any] = {f"agreement of {n}": round(sum(v) / len(v), 4) for n, v in alike.items()}
    facts["tokens looked at"] = tokens
    if why:
        facts["note"] = f"keys were not turned: {why}"
    return found, facts


def _keys_stay(source: Checkpoint, anatomy: Anatomy) -> str:
    """Why keys cannot be turned; empty where they can."""
    config = source.hf_config
    rope = getattr(config, "rope_parameters", None) or {}
    if source.config["model_type"] not in _HALF_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "the model does not rotate whole heads in the pairs (i, i + d/2)"
    for p in anatomy:
        if p.role in ("norm.q", "norm.k") and p.kind == "weight":
            one, two = source.get(p.name).chunk(2)
            if not torch.equal(one, two):
                return "a norm scales the two halves of a frequency pair differently"
    return ""


@torch.no_grad()
def _grams(source: Checkpoint, knobs: Knobs) -> tuple[dict[tuple[int, str], Tensor], int]:
    """Gram matrices of all keys (before RoPE) and values of each block, in double precision, and the tokens they are of."""
    if knobs.data.path:
        vocab = int(source.hf_config.get_text_config().vocab_size)
        rows = tokenize(read(knobs.data), source.tokenizer(), vocab, knobs.context)
        whole = rows.ids[rows.lengths == rows.ids.shape[1]].long()
        ids = whole[: max(1, knobs.tokens // knobs.context)] if len(whole) else rows.ids[:1, : rows.lengths[0]].long()
    else:
        ids = probe_ids(source)[0]
    model = source.model(torch.float32).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    grams: dict[tuple[int, str], Tensor] = {}
    places: dict[Any, tuple[int, str]] = {}
    anatomy = Anatomy(model)
    for b in anatomy.blocks:
        for n in "kv":
            places[model.get_submodule(anatomy.attention(b)[n].name.rpartition(".")[0])] = (b.index, n)

    def add(module: Any, output: Tensor) -> None:
        x = output.flatten(0, -2).double().cpu()
        grams[places[module]] = grams.get(places[module], 0) + x.T @ x

    with capture(places, add):
        for part in ids.split(8):
            model(input_ids=part.to(model.device), use_cache=False)
    return grams, ids.numel()


METHOD = gqa
