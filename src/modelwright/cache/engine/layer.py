"""One layer of a transformers cache, which holds what eviction kept of the prompt and every token read since.

    whole     keys (B, G, T, d) as in the stock layer, until the prompt is read
    even      keys (B, G, kept + tail, d) when every row and head keeps equally many
    uneven    what was kept lies packed, (total, d) over all rows and heads; keys (B, G, tail, d) hold the tokens read since

The layer reports its true length, so new tokens go on at their true positions, and it reports the tail alone as what the
mask must cover: that part of a mask is the same for every layer, whatever each one kept, and `mask` puts the kept tokens
in front of it. G is the number of key-value heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from modelwright.core.errors import UserError


def take(states: Tensor, index: Tensor) -> Tensor:
    """The columns `index` (B, G, n) of keys or values (B, G, T, d): whole rows are copied, which gather would do number by number."""
    B, G, T, d = states.shape
    rows = index + torch.arange(0, B * G * T, T, device=index.device).view(B, G, 1)
    return states.reshape(-1, d).index_select(0, rows.flatten()).view(B, G, -1, d)


class EvictLayer(DynamicLayer):
    """`owner` is the block that evicts; the layer is of no use after it."""

    is_croppable = False
    keys: Tensor  # None until the first token is read, and so are the values
    values: Tensor

    def __init__(self, owner: Any):
        super().__init__()
        self.owner = owner
        self._forget()

    def _forget(self) -> None:
        self.seen = 0  # tokens read
        self.read = 0  # of these, tokens of the prompt that eviction has been through
        self.kept = 0  # columns that the kept ones take, for the longest row and head
        self.slots: Tensor | None = None  # (B, G, kept) which columns are real, where uneven
        self.packed: tuple[Tensor, Tensor] | None = None
        self.queries: Tensor | None = None  # the last queries of a prompt read in chunks,
        self.manner: tuple[float, float | None] = (1.0, None)  # their scale and soft cap,
        self.states: tuple[Tensor, Tensor] | None = None  # and keys and values as attention sees them, where the cache holds others
        self.lengths: list[int] | None = None  # real tokens of each row, where padded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.owner.active:
            raise UserError("this cache was made in an evict block that has ended", "the model is stock again", "use it inside the block")
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        if self.packed is None or self.slots is None:
            return keys, values
        front = self._unpacked()
        return torch.cat([front[0], keys], 2), torch.cat([front[1], values], 2)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen - self.read + query_length, self.read

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError("an evicted cache cannot be rolled back", "what was evicted is gone", "do without assisted decoding")

    def reset(self) -> None:
        self._forget()
        super().reset()

    # ---- eviction ----------------------------------------------------------------------------------------------------
    def keep(self, index: Tensor | None, slots: Tensor | None = None) -> None:
        """Hold only the tokens at `index` (B, G, n), in ascending order; all for None. Columns where `slots` is false are spare."""
        self.read, self.queries, self.states = self.seen, None, None
        self.kept = self.seen if index is None else index.shape[2]
        if index is None:
            return
        taken = [take(t, index) for t in (self.keys, self.values)]
        self.keys, self.values = taken
        if slots is not None:
            self.keys, self.values = taken[0][:, :, :0], taken[1][:, :, :0]
            self.slots, self.packed = slots, (taken[0][slots], taken[1][slots])

    def _unpacked(self) -> list[Tensor]:
        """What was kept as (B, G, kept, d); spare columns repeat a neighbour and are masked."""
        assert self.packed is not None and self.slots is not None
        at = (self.slots.flatten().cumsum(0) - 1).clamp(min=0)
        return [t.index_select(0, at).view(*self.slots.shape, -1) for t in self.packed]

    def mask(self, query: Tensor, given: Tensor | None, additive: bool) -> Tensor | None:
        """The mask (B or 1, heads or 1, q, kept + tail), from the one for the tail; None where all may be seen."""
        rows, heads, q = query.shape[:3]
        if not self.read or given is None and self.slots is None and q == 1:
            return given
        tail = self.seen - self.read
        if given is None:
            given = torch.ones(q, tail, dtype=torch.bool, device=query.device).tril(tail - q)[None, None]
            if additive:
                given = _added(given, query.dtype)
        given = given[..., -tail:]
        front = torch.ones(1, 1, 1, self.kept, dtype=torch.bool, device=query.device)
        if self.slots is not None:
            front = self.slots.repeat_interleave(heads // self.slots.shape[1], 1)[:, :, None]
        if given.dtype != torch.bool:
            front = _added(front, given.dtype)
        shape = (max(len(front), len(given)), max(front.shape[1], given.shape[1]), q)
        return torch.cat([front.expand(*shape, -1), given.expand(*shape, -1)], -1)

    def nbytes(self) -> int:
        """Bytes of keys and values, and of what tells them apart."""
        held = [self.keys, self.values, self.slots, *(self.packed or ())]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    # ---- beams and batches -------------------------------------------------------------------------------------------
    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self.queries = None if self.queries is None else change(self.queries)
        self.states = None if self.states is None else (change(self.states[0]), change(self.states[1]))
        if self.lengths is not None:
            self.lengths = change(torch.tensor(self.lengths, device=self.keys.device)).tolist()
        if self.slots is not None:
            front = [change(t) for t in self._unpacked()]
            self.slots = change(self.slots)
            self.packed = (front[0][self.slots], front[1][self.slots])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0 where it is true, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
