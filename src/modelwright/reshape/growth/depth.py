"""Depth: which source block each new block comes from, and which new blocks are silent."""

import re
from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError

_BLOCK = re.compile(r"^(.*?\.?(?:layers|h|block|layer)\.)(\d+)(\..*)$")
# settings that hold one value per block, and settings that hold indices of blocks
_PER_BLOCK = ("layer_types", "mlp_layer_types", "norm_placement", "no_rope_layers", "attention_layers")
_INDICES = ("mlp_only_layers", "dense_layers")


@dataclass(frozen=True)
class Depth:
    """`order[i]` is the source block of new block i. A silent block adds nothing to the residual stream when it is made; a fresh
    one has new random matrices."""

    order: tuple[int, ...]
    silent: frozenset[int]
    fresh: frozenset[int]
    blocks: int  # of the source

    @property
    def same(self) -> bool:
        """Whether the blocks that are not silent are the source's, each once and in order: then the function is the same."""
        return [b for i, b in enumerate(self.order) if i not in self.silent] == list(range(self.blocks))

    def targets(self, source: int) -> list[int]:
        """The new blocks that come from a source block."""
        return [i for i, b in enumerate(self.order) if b == source]


def plan(blocks: int, operator: str, factor: int = 1, preset: str = "none", order: list[int] | None = None) -> Depth:
    """The new blocks in order.

    stack: new block i comes from block i mod L. The other operators keep copies together: i comes from block i // factor.
    Every copy but the first is new: silent under zero and net2net, fresh under net2net and masked.
    """
    if preset == "solar":  # two copies of the model; a quarter is cut off at the seam of each
        cut = blocks // 4
        found = [*range(blocks - cut), *range(cut, blocks)] if cut else list(range(blocks))
    elif preset == "llama_pro":  # one silent copy after each group of four blocks (32 -> 40)
        found = [b for b in range(blocks) for _ in range(2 if b % 4 == 3 else 1)]
    elif order:
        found = list(order)
    elif operator == "stack":
        found = [i % blocks for i in range(blocks * factor)]
    else:
        found = [i // factor for i in range(blocks * factor)]
    if wrong := [b for b in found if not 0 <= b < blocks]:
        raise UserError(f"order names block {wrong[0]}", f"the model has blocks 0 to {blocks - 1}", "name blocks that are there")
    first = {b: i for i, b in reversed(list(enumerate(found)))}
    new = frozenset(i for i, b in enumerate(found) if first[b] != i)
    silent = operator in ("zero", "net2net") or preset == "llama_pro" and operator != "masked"
    return Depth(tuple(found), new if silent else frozenset(), new if operator in ("net2net", "masked") else frozenset(), blocks)


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to."""
    found = _BLOCK.match(name)
    return int(found[2]) if found else None


def rename(name: str, block: int) -> str:
    """The same tensor of another block."""
    return _BLOCK.sub(rf"\g<1>{block}\g<3>", name)


def settings(raw: dict[str, Any], config: Any, depth: Depth) -> dict[str, Any]:
    """What the config of the deeper model says otherwise: the number of blocks, and every setting that lists blocks."""
    key = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed: dict[str, Any] = {key: len(depth.order)}
    for name in _PER_BLOCK:
        value = raw.get(name, getattr(config, name, None))
        if isinstance(value, list) and len(value) == depth.blocks:
            changed[name] = [value[b] for b in depth.order]
    for name in _INDICES:
        if value := raw.get(name):
            changed[name] = [i for i, b in enumerate(depth.order) if b in value]
    return changed
