"""Grow a model: more blocks, wider blocks, or both, from the weights that are there.

When to use it: a larger model is wanted and the compute for it is short. Train a small one, grow it, train on: G_stack (2405.15319)
reports the loss of 300B tokens after 194B. `reshape.growth_plan` says when to grow. Or grow a finished checkpoint and tune it on.

    depth (`depth` times as many blocks, or a preset, or an order of your own)       width (`hidden`, `heads`, `ffn`)
    stack        new block i is block i mod L, copied bit for bit (G_stack)          units copied, readers divided
    interpolate  new block i is block i // depth                                     the same, copies side by side
    zero         as interpolate; each copy but the first adds nothing:               new units carry 0, gains and epsilon are
                 its two output projections are 0 (LEMON, LLaMA-Pro)                 set right for the norm's mean (LEMON)
    net2net      new blocks add nothing and have new random matrices                 units copied, readers divided (Net2Net)
    masked       new blocks have new random matrices (MSG, 2305.02869)               new units are random, written and read

Which keep the function: in depth zero and net2net, to the last bit; in width all but masked, to rounding. In 16-bit weights width keeps
it where every factor is a power of two (for zero: of four); elsewhere the report says that it is rounded. A masked model is the old one
behind the masks of `tune.masked`, which opens them while it trains. `stack` and `interpolate` change the function in depth, and training
repairs it in a few hundred steps. The paper finds stack the best of the four after training; in bench/grow.py they end close together.

Presets: solar (2312.15166), two copies of the model that each lose a quarter of the blocks at the seam, 32 -> 48; llama_pro
(2401.02415), a silent copy after every fourth block, 32 -> 40; LLaMA-Pro trains the new blocks alone, which `tune.new_blocks` does.

Embeddings, final norm and head are copied as they are; so are biases, q- and k-norms and layer types, which are taken along with
their block. Heads grow by whole groups, a key and value head with its queries, and keep their width, so RoPE and the scale of the
scores stay. Embeddings that are also the head stay one matrix. The optimizer starts anew and the learning rate is warmed up again.

Official code (tongxuluo/prts), where it differs: four fixed Llama shapes; modules of a stacked model are shared until saved; its zero
width leaves the norms wrong, so the function changes; its Net2Net width copies single query and key rows across heads, which breaks
heads and RoPE. Ours: any model of the role map in depth; width as above; the copies are told apart by `noise` (growth/width.py).
LiGO (learnt growth, 2303.00980) needs training of its own and is not here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.classes import config_of, disk_shapes
from modelwright.core.model.writer import Blueprint, natural
from modelwright.reshape.growth.depth import Depth, block_of, plan, rename, settings
from modelwright.reshape.growth.sizes import wider
from modelwright.reshape.growth.width import Width, generator


@dataclass(frozen=True)
class Knobs:
    operator: Literal["stack", "interpolate", "zero", "net2net", "masked"] = knob("stack", "where new blocks and units come from")
    depth: int = knob(4, "times as many blocks; 1: as many as now", low=1)
    preset: Literal["none", "solar", "llama_pro"] = knob("none", "a known depth, instead of depth")
    order: list[int] = knob([], "the source block of each new block, instead of depth")
    hidden: int | None = knob(None, "units of the residual stream; heads and ffn grow alike unless they are given", low=1)
    heads: int | None = knob(None, "query heads; key and value heads grow alike", low=1)
    ffn: int | None = knob(None, "neurons of the feed-forward part", low=1)
    noise: float = knob(0.01, "width by copies: share by which the readers of two copies are made to differ", low=0, high=0.5)


_MARKS = ("grown_blocks", "grown_from")  # what an earlier growth wrote into config.json


def grow(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Blueprint, str]:
    """The grown checkpoint as a blueprint, and what it promises: 'same function' or 'changed function'."""
    anatomy = Anatomy(source.skeleton)
    depth = _depth(source, anatomy, knobs)
    found = wider(source, anatomy, knobs.operator, knobs, seed)
    width, changed = found if found else (None, {})
    if depth.order == tuple(range(depth.blocks)) and width is None:
        why = "depth is 1" if knobs.preset == "none" else f"{knobs.preset} asks for four blocks or more and the model has {depth.blocks}"
        raise UserError("nothing would grow", f"{why}, and no width is larger than the model's", "give depth, hidden, heads or ffn")
    raw = {k: v for k, v in (json.loads(source.hf_config.to_json_string()) | source.config).items() if k not in _MARKS}
    config = raw | settings(raw, source.hf_config, depth) | changed
    new_blocks = sorted(i for b in range(depth.blocks) for i in depth.targets(b)[1:])
    if new_blocks:
        config["grown_blocks"] = new_blocks  # which tune.new_blocks trains alone
    names = _names(source, config, depth, width)
    facts: dict[str, Any] = {
        "operator": knobs.operator,
        "blocks": f"{depth.blocks} -> {len(depth.order)}",
        "source of each block": list(depth.order),
        "new blocks": new_blocks,
    }
    facts |= {n: f"{a.n} -> {a.n2}" for n, a in (width.axes if width else {}).items() if a.n != a.n2 and n != "q"}
    rounded = (
        width is not None and not width.random and not width.exact_in_halves() and any(source.dtype(n).itemsize < 4 for n in source.table)
    )
    if rounded:
        facts["note"] = (
            "a factor of the width is no power of two (zero: of four), so the function is kept only up to the rounding of 16-bit weights"
        )

    def stream() -> Iterator[tuple[str, Tensor]]:
        for old, news in names.items():
            part = anatomy.parts.get(old)
            tensor = source.get(_stored(source, old))
            if width is not None:
                assert part is not None
                tensor = width.grow(tensor, part).contiguous()
            for new in news:
                yield new, _in_new_block(tensor, new, depth, anatomy, old, source.hf_config, seed)

    dtypes = {new: source.dtype(_stored(source, old)) for old, news in names.items() for new in news}
    same = depth.same and not rounded and knobs.operator != "masked"
    return Blueprint(config, dtypes, stream, source, facts), "same function" if same else "changed function"


def _depth(source: Checkpoint, anatomy: Anatomy, knobs: Knobs) -> Depth:
    config, name = source.hf_config, type(source.skeleton).__name__
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UserError(f"{name} cannot grow", "it is more than one stack of blocks", "give a decoder-only model")
    if knobs.preset != "none" and knobs.order:
        raise UserError(f"both preset={knobs.preset} and order are given", "a preset is an order of its own", "give one of the two")
    depth = plan(len(anatomy.blocks), knobs.operator, knobs.depth, knobs.preset, knobs.order)
    if depth.silent and (why := _never_silent(anatomy, config)):
        raise UserError(f"{name} has no block that does nothing", why, "use operator=stack or interpolate")
    return depth


def _never_silent(anatomy: Anatomy, config: Any) -> str:
    """Why a block whose output projections are 0 would still change something; empty where it would not."""
    roles = {p.role for p in anatomy}
    post = "norm.final" not in roles or not getattr(config, "do_layer_norm_before", True)
    if post or "post" in (getattr(config, "norm_placement", None) or []):
        return "its norms stand on the residual stream, after the sum"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "it scales attention by the number of the block"
    return ""


def _names(source: Checkpoint, config: dict[str, Any], depth: Depth, width: Width | None) -> dict[str, list[str]]:
    """Source tensor -> new tensors, in the order of the source's files."""
    shapes = disk_shapes(config_of(config))
    found: dict[str, list[str]] = {}
    for new in sorted(shapes, key=natural):
        block = block_of(new)
        old = new if block is None else rename(new, depth.order[block])
        there = _stored(source, old)
        if block is not None and (there not in source or width is None and source.shape(there) != shapes[new]):
            raise UserError(
                f"block {block} of the grown {type(source.skeleton).__name__} cannot be made of block {depth.order[block]}",
                f"the class puts another kind of block there, which needs {new} {shapes[new]}",
                "choose a depth that repeats the pattern of the blocks",
            )
        found.setdefault(old, []).append(new)
    order = {n: i for i, n in enumerate(source.table)}
    return dict(sorted(found.items(), key=lambda item: order.get(_stored(source, item[0]), -1)))


def _stored(source: Checkpoint, name: str) -> str:
    """A tensor's name in the source's files; some checkpoints, such as GPT-2's, are saved without the prefix of the body."""
    return name if name in source else name.removeprefix(f"{source.skeleton.base_model_prefix}.")


_OUTPUTS = ("attn.o", "ffn.down", "expert.down", "shared.down")
_EXPERT_OUTPUTS = (".w2.weight", ".down_proj.weight", ".output_linear.weight")  # as experts are called on disk


def _in_new_block(tensor: Tensor, new: str, depth: Depth, anatomy: Anatomy, old: str, config: Any, seed: int) -> Tensor:
    """The tensor as a silent or fresh block has it; unchanged in any other block."""
    block, part = block_of(new), anatomy.parts.get(old)
    if block in depth.silent and (part.role in _OUTPUTS if part else old.endswith(_EXPERT_OUTPUTS)):
        return torch.zeros_like(tensor)
    if block in depth.fresh and tensor.dim() > 1:  # norms stay the neighbour's: a gain's neutral value differs between families
        std = float(getattr(config, "initializer_range", 0.02))
        return (torch.randn(tensor.shape, generator=generator(seed, new)) * std).to(tensor.dtype)
    return tensor


METHOD = grow
