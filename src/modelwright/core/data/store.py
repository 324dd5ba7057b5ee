"""Token rows on disk: made once, in the cache of the user, read row by row by any number of processes without holding them in memory.

A store is a folder: `ids.bin` (int32, one document after the other), `learnt.bin` (one byte a token, where not every token is learnt),
`ends.npy` (where each document ends; absent for running text) and `facts.json`, written last. Its name is a fingerprint of everything
that went into it, and it appears by one rename, so that a process that was killed leaves none behind.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.files import disk_errors

_BUFFER = 1 << 20  # tokens held before they are written
_ENDLESS = "answers without an end token"  # a fact that warns, of one source or of all


def cache_folder() -> Path:
    """Where stores lie: $MODELWRIGHT_CACHE, else the user's cache folder."""
    home = os.environ.get("MODELWRIGHT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "modelwright")
    return Path(home).expanduser() / "rows"


def store_key(*parts: Any) -> str:
    """A fingerprint of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class StoreWriter:
    """Appends documents to a store that is being made."""

    def __init__(self, folder: Path, documents: bool, masked: bool):
        self.folder, self.documents, self.masked = folder, documents, masked
        with disk_errors(folder):
            folder.mkdir(parents=True)
            names = ["ids.bin", *(["learnt.bin"] if masked else [])]
            self._files = [open(folder / n, "wb") for n in names]  # noqa: SIM115 - closed in `close`
        self._ids: list[np.ndarray] = []
        self._learnt: list[np.ndarray] = []
        self._ends: list[int] = []
        self._held = 0
        self.tokens = 0
        self.low, self.high = 0, -1

    def add(self, ids: np.ndarray, learnt: np.ndarray | None = None) -> None:
        """One document, or a piece of running text: ids (n,), and which are learnt (n,) bool."""
        if not len(ids):
            return
        self._ids.append(ids.astype(np.int32, copy=False))
        if self.masked:
            self._learnt.append(np.ones(len(ids), np.uint8) if learnt is None else learnt.astype(np.uint8))
        self.tokens += len(ids)
        self.low, self.high = min(self.low, int(ids.min())), max(self.high, int(ids.max()))
        if self.documents:
            self._ends.append(self.tokens)
        self._held += len(ids)
        if self._held >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        with disk_errors(self.folder):
            for file, parts in zip(self._files, (self._ids, self._learnt), strict=False):
                if parts:
                    file.write(np.concatenate(parts).data)
        self._ids, self._learnt, self._held = [], [], 0

    def close(self, facts: dict[str, Any]) -> None:
        """Write what is left; the facts come last."""
        self._flush()
        with disk_errors(self.folder):
            for file in self._files:
                file.close()
            if self.documents:
                np.save(self.folder / "ends.npy", np.asarray(self._ends, np.int64))
            (self.folder / "facts.json").write_text(json.dumps(facts | {"length": self.tokens}))


def publish(part: Path, to: Path) -> None:
    """Give a finished store its name; the first of several processes wins."""
    try:
        os.rename(part, to)
    except OSError:
        if not (to / "facts.json").is_file():
            raise
        shutil.rmtree(part, ignore_errors=True)


@dataclass
class StoredRows(TokenRows):
    """Rows of a store. Running text: row i is the tokens i * width to (i + 1) * width. Documents: row i is the documents `bins[i]`, each
    cut at `width`; with `packed` they share the row and do not see each other."""

    folder: Path
    width: int
    first: int = 0  # running text: first row of this part
    count: int = 0
    bins: Sequence[Sequence[int]] | None = None
    packed: bool = False
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._length = (self.folder / "ids.bin").stat().st_size // 4
        self._masked = (self.folder / "learnt.bin").is_file()
        self._ends = None if self.bins is None else np.load(self.folder / "ends.npy", mmap_mode="r")
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return self.count if self.bins is None else len(self.bins)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def _read(self, name: str, kind: Any, start: int, n: int) -> np.ndarray:
        # Read, not mapped: pages of a mapped file count as this process's memory, and an epoch would touch the whole corpus.
        if name not in self._files:
            self._files[name] = os.open(self.folder / name, os.O_RDONLY)
        size = np.dtype(kind).itemsize
        return np.frombuffer(bytearray(os.pread(self._files[name], n * size, start * size)), kind)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one document, cut at the width, and which are learnt."""
        assert self._ends is not None
        start = int(self._ends[i - 1]) if i else 0
        n = min(int(self._ends[i]) - start, self.width)
        ids = self._read("ids.bin", np.int32, start, n)
        return ids, self._read("learnt.bin", np.uint8, start, n) if self._masked else np.ones(n, np.uint8)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.bins is None:
            start = (self.first + i) * self.width
            ids = torch.from_numpy(self._read("ids.bin", np.int32, start, min(self.width, self._length - start)))
            return {"input_ids": ids, "labels": ids, "length": torch.tensor(len(ids)), "example_id": i}
        parts = [self.document(d) for d in self.bins[i]]
        ids = torch.from_numpy(np.concatenate([p[0] for p in parts]))
        learnt = torch.from_numpy(np.concatenate([p[1] for p in parts])).bool()
        learnt[torch.tensor([0, *(len(p[0]) for p in parts[:-1])]).cumsum(0)] = False  # the first token of a text has nothing before it
        row = {"input_ids": ids, "labels": torch.where(learnt, ids, IGNORE), "length": torch.tensor(len(ids)), "example_id": i}
        if self.packed:
            row["segments"] = torch.cat([torch.full((len(p[0]),), d, dtype=torch.int32) for d, p in zip(self.bins[i], parts, strict=True)])
        return row

    @property
    def tokens(self) -> int:
        if self.bins is None:
            return min(self.count * self.width, self._length - self.first * self.width)
        assert self._ends is not None
        lengths = np.minimum(np.diff(self._ends, prepend=0), self.width)
        return int(sum(int(lengths[list(b)].sum()) for b in self.bins))

    def split(self, at: int) -> tuple["StoredRows", "StoredRows"]:
        if self.bins is None:
            a, b = replace(self, count=at), replace(self, first=self.first + at, count=self.count - at)
        else:
            a, b = replace(self, bins=self.bins[:at]), replace(self, bins=self.bins[at:])
        total = max(self.tokens, 1)
        a.bytes, b.bytes = (round(self.bytes * part.tokens / total) for part in (a, b))
        return a, b


@dataclass
class MixedRows(TokenRows):
    """Rows of several sources in fixed shares: `index` (N, 2) names the source and the row."""

    parts: list[TokenRows]
    index: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = [max(len(p), 1) for p in self.parts]
        used = np.bincount(self.index[:, 0], minlength=len(self.parts))
        self.bytes = round(sum(p.bytes * u / r for p, u, r in zip(self.parts, used, rows, strict=True)))
        self._tokens = round(sum(p.tokens * u / r for p, u, r in zip(self.parts, used, rows, strict=True)))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        part, row = (int(v) for v in self.index[i])
        found = self.parts[part][row] | {"example_id": i}
        if self.packed and "segments" not in found:  # one text fills the row
            found["segments"] = torch.zeros(len(found["input_ids"]), dtype=torch.int32)
        return found

    @property
    def width(self) -> int:  # type: ignore[override]
        return max(p.width for p in self.parts)

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return any(p.packed for p in self.parts)

    @property
    def tokens(self) -> int:
        return self._tokens

    def split(self, at: int) -> tuple["MixedRows", "MixedRows"]:
        return tuple(MixedRows(self.parts, part, self.facts, self.stops) for part in (self.index[:at], self.index[at:]))  # type: ignore[return-value]


def mixed(parts: list[TokenRows], weights: list[float], seed: int) -> MixedRows:
    """As many rows as all sources have, drawn in the shares of `weights`; a source that runs out begins again in another order."""
    rng, total = np.random.default_rng(seed), sum(len(p) for p in parts)
    shares = np.asarray(weights) / sum(weights)
    wanted = np.floor(shares * total + 0.5).astype(int)
    pieces = []
    for k, (part, n) in enumerate(zip(parts, wanted, strict=True)):
        orders = [rng.permutation(len(part)) for _ in range(-(-n // len(part)))]
        rows = np.concatenate(orders)[:n] if orders else np.zeros(0, int)
        pieces.append(np.stack([np.full(len(rows), k), rows], 1))
    index = rng.permutation(np.concatenate(pieces))
    facts = {"sources": {f"{k}": {"rows": len(p), "drawn": int(n), **p.facts} for k, (p, n) in enumerate(zip(parts, wanted, strict=True))}}
    facts |= {_ENDLESS: sum(p.facts.get(_ENDLESS, 0) for p in parts)}
    return MixedRows(parts, index, facts, list(dict.fromkeys(s for p in parts for s in p.stops)))
