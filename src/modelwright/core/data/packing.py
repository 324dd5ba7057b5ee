"""Padding-free packing: several texts in one row of fixed capacity, none cut, none seeing another.

`multipack` is OpenChat's sampler (2309.11235, released code): shuffle, then for each optimizer step take the longest
prefix that first-fit-decreasing packs into the step's bins. Ours keeps the tail that the released code drops, and packs
the bins of several steps at once: rows are shuffled anyway, and a small batch would fill its bins badly.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError

_BINS = 32  # that are packed together, at least


@dataclass
class Texts:
    """Tokenised texts with a learning weight for each token."""

    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    bytes: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def first_fit(lengths: list[int], capacity: int, bins: int) -> list[list[int]] | None:
    """First-fit-decreasing of items into at most `bins` bins of `capacity`; None when they do not fit."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    room = [capacity] * bins
    found: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        for b in range(bins):
            if room[b] >= lengths[i]:
                room[b] -= lengths[i]
                found[b].append(i)
                break
        else:
            return None
    return found


def multipack(lengths: list[int], capacity: int, bins: int, seed: int = 0) -> list[list[int]]:
    """Bins (lists of item numbers), `bins` of them for each step, every item in exactly one.

    Raises ValueError for an item longer than `capacity`.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} does not fit into {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    sizes = np.asarray(lengths)[order]
    total = np.concatenate([[0], np.cumsum(sizes)])
    made: list[list[int]] = []
    at = 0
    while at < len(order):
        high = int(np.searchsorted(total, total[at] + capacity * bins, side="right")) - 1  # no more than this can fit
        low, best = at + 1, None
        while low <= high:
            middle = (low + high + 1) // 2
            packed = first_fit(sizes[at:middle].tolist(), capacity, bins)
            if packed is None:
                high = middle - 1
            else:
                best, low = (middle, packed), middle + 1
        assert best is not None
        made += [[int(order[at + i]) for i in b] for b in best[1] if b]
        at = best[0]
    return made


def packed(texts: Texts, capacity: int, bins: int, seed: int) -> Rows:
    """One row per bin. A text longer than the capacity is left out and counted; the first token of a text is not learnt."""
    fits = [i for i, ids in enumerate(texts.ids) if len(ids) <= capacity]
    together = bins * -(-_BINS // bins)
    made = [[fits[j] for j in b] for b in multipack([len(texts.ids[i]) for i in fits], capacity, together, seed)]
    return _rows(texts, made, capacity, True)


def padded(texts: Texts, capacity: int) -> Rows:
    """One row per text, padded on the right; a text longer than the capacity is left out and counted."""
    return _rows(texts, [[i] for i, ids in enumerate(texts.ids) if len(ids) <= capacity], capacity, False)


def _rows(texts: Texts, made: list[list[int]], capacity: int, several: bool) -> Rows:
    left_out = len(texts) - sum(map(len, made))
    if not made:
        raise UserError(f"no text is at most {capacity} tokens long", f"{left_out} are longer", "raise train.context")
    n, width = len(made), capacity if several else max(len(texts.ids[b[0]]) for b in made)
    ids, labels = torch.zeros(n, width, dtype=torch.int32), torch.full((n, width), IGNORE, dtype=torch.int32)
    weights, segments = torch.zeros(n, width), torch.full((n, width), -1, dtype=torch.int32)
    lengths = torch.tensor([sum(len(texts.ids[i]) for i in b) for b in made])
    for row, b in enumerate(made):
        flat = torch.tensor([t for i in b for t in texts.ids[i]], dtype=torch.int32)
        w = torch.tensor([x for i in b for x in (0.0, *texts.weights[i][1:])])
        ids[row, : len(flat)], weights[row, : len(flat)] = flat, w
        labels[row, : len(flat)] = torch.where(w > 0, flat, IGNORE)
        segments[row, : len(flat)] = torch.repeat_interleave(torch.tensor(b), torch.tensor([len(texts.ids[i]) for i in b]))
    kept = int(lengths.sum())
    facts = {"documents": len(texts), "longer than the context, left out": left_out, "rows": n, "tokens": kept, "fill": kept / ids.numel()}
    rows = Rows(ids, labels, lengths, 0, facts, weights, segments if several else None)
    if not bool((weights[:, 1:] > 0).any()):
        raise UserError("no token of the data is to be learnt", "every weight is zero", "check the roles, the sources and their weights")
    return rows
