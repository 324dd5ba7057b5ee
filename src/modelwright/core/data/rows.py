"""Token rows, as training reads them: what a row is, a small set of rows in memory, filling up a batch, collation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
_FILL = {"labels": IGNORE, "segments": -1, "input_ids": 0, "weights": 0}


class TokenRows(torch.utils.data.Dataset, ABC):
    """Rows of tokens. A row is a dictionary: input_ids (T,), labels (T,) with -100 where nothing is learnt, length, example_id;
    weights (T,) weigh the learnt tokens; segments (T,) number the texts that share a row, -1 where it is padded: texts of one row do
    not see each other and each has positions from 0. T is at most `width`."""

    bytes: int  # of the text, for bits per byte; 0 when unknown
    facts: dict[str, Any]
    stops: list[int]  # ids that end what the assistant says
    width: int  # tokens of the longest row, at most
    packed: bool  # whether several texts share a row

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @abstractmethod
    def split(self, at: int) -> tuple["TokenRows", "TokenRows"]:
        """The first `at` rows and the rest; bytes are shared out by tokens."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of all rows, padding excluded."""


@dataclass
class Rows(TokenRows):
    """Rows in memory: ids (N, T) int32, labels (N, T), lengths (N,), weights (N, T), segments (N, T)."""

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None
    segments: Tensor | None = None
    stops: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {"input_ids": self.ids[i], "labels": self.labels[i], "length": self.lengths[i], "example_id": i}
        return row | {k: v[i] for k, v in (("weights", self.weights), ("segments", self.segments)) if v is not None}

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.ids.shape[1]

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return self.segments is not None

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def split(self, at: int) -> tuple["Rows", "Rows"]:
        parts = []
        for s in (slice(None, at), slice(at, None)):
            n = int(self.lengths[s].sum())
            size = round(self.bytes * n / max(self.tokens, 1))
            weights, segments = (v if v is None else v[s] for v in (self.weights, self.segments))
            parts.append(Rows(self.ids[s], self.labels[s], self.lengths[s], size, self.facts, weights, segments, self.stops))
        return parts[0], parts[1]


class PaddedDataset(torch.utils.data.Dataset):
    """Rows and enough empty ones that every optimizer step of every process is full; an empty row counts for nothing."""

    def __init__(self, rows: TokenRows, multiple: int):
        self.rows, self.n = rows, -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < len(self.rows):
            return self.rows[i]
        row = self.rows[0]
        return {k: torch.full_like(row[k], v) for k, v in _FILL.items() if k in row} | {"length": torch.tensor(0), "example_id": -1}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest row; the attention mask is left out when nothing is padded.

    Rows that hold several texts get position ids instead, from which transformers keeps the texts apart.
    """
    lengths = torch.stack([r["length"] for r in rows])
    longest = max(int(lengths.max()), 2)
    batch = {k: _stacked([r[k] for r in rows], longest, _FILL[k]).long() for k in ("input_ids", "labels")}
    batch["example_id"] = torch.tensor([r["example_id"] for r in rows])
    batch["real"] = torch.arange(longest) < lengths[:, None]  # (B, T): no padding
    if "weights" in rows[0]:
        batch["weights"] = _stacked([r["weights"] for r in rows], longest, 0)
    if "segments" in rows[0]:
        batch["segments"] = _stacked([r["segments"] for r in rows], longest, -1).long()
        batch["position_ids"] = positions(batch["segments"])
    elif int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths.clamp(min=1)[:, None]).long()
    return batch


def _stacked(values: list[Tensor], longest: int, fill: int) -> Tensor:
    if all(len(v) >= longest for v in values):
        return torch.stack([v[:longest] for v in values])
    out = values[0].new_full((len(values), longest), fill)
    for i, v in enumerate(values):
        out[i, : min(len(v), longest)] = v[:longest]
    return out


def positions(segments: Tensor) -> Tensor:
    """Position of each token within its text, from (B, T) text numbers."""
    at = torch.arange(segments.shape[1]).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return at - torch.where(begins, at, 0).cummax(1).values
