"""Examples of token rows, and rows that hold pairs of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows


@dataclass(frozen=True)
class Example:
    """Where one text stands: its row, the first token and the one after the last, its number, how many of its tokens are learnt."""

    row: int
    start: int
    stop: int
    id: int
    learnt: int


def examples_of(rows: TokenRows) -> list[Example]:
    """Every text of the rows, those that share a row too."""
    found = []
    for i in range(len(rows)):
        row = rows[i]
        n, learnt = int(row["length"]), row["labels"] != IGNORE
        if "segments" in row:
            ids, counts = row["segments"][:n].unique_consecutive(return_counts=True)
            ends = counts.cumsum(0).tolist()
            places = zip([0, *ends[:-1]], ends, ids.tolist(), strict=True)
        else:
            places = zip([0], [n], [int(row["example_id"])], strict=True)
        found += [Example(i, a, b, e, int(learnt[a + 1 : b].sum())) for a, b, e in places]
    return found


def halves(confidence: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the confident and of the unconfident half, each in random order; ties are broken by lot, the middle of an odd number
    is in neither."""
    rng, n = np.random.default_rng(seed), len(confidence)
    order = np.lexsort((rng.random(n), -confidence))
    return rng.permutation(order[: n // 2]).tolist(), rng.permutation(order[n - n // 2 :]).tolist()


class PairedRows(TokenRows):
    """Row i is the examples `plan[i]`: the two of a pair as two sequences, or, with packed rows, pairs one after another in one."""

    def __init__(self, inner: TokenRows, plan: list[list[Example]], facts: dict[str, Any]):
        self.inner, self.plan, self.facts = inner, plan, facts
        self.bytes, self.stops, self.packed = inner.bytes, inner.stops, inner.packed
        self.width = max(sum(e.stop - e.start for e in b) if self.packed else max(e.stop - e.start for e in b) for b in plan)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if not self.packed:
            first, *other = (self.inner[e.row] for e in self.plan[i])
            return first | {"other": other[0] if other else None}
        parts = [self._part(e) for e in self.plan[i]]
        row = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return row | {"length": torch.tensor(len(row["input_ids"])), "example_id": i, "pairs": len(parts) // 2}

    def _part(self, e: Example) -> dict[str, Tensor]:
        row = self.inner[e.row]
        return {k: row[k][e.start : e.stop] for k in ("input_ids", "labels", "weights", "segments") if k in row}

    def split(self, at: int) -> tuple["PairedRows", "PairedRows"]:
        return PairedRows(self.inner, self.plan[:at], self.facts), PairedRows(self.inner, self.plan[at:], self.facts)

    @property
    def tokens(self) -> int:
        return sum(e.stop - e.start for b in self.plan for e in b)
