"""From band keys to clusters of near-duplicates, on disk: keys in partitions, verified edges, labels by propagation.

Only one partition of keys, the labels (8 bytes a document) and the mapped shingles are in memory at a time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

PARTS = 16
LEADERS = 8  # documents of one bucket that a newcomer is compared with, at most
_ROW = np.dtype([("key", "<u8"), ("doc", "<i8")])


class Keys:
    """Band keys of documents, spread over files by their last bits."""

    def __init__(self, folder: Path):
        self.files = [folder / f"keys{i}" for i in range(PARTS)]
        self.outs = [open(f, "wb") for f in self.files]  # noqa: SIM115 - closed by buckets()

    def add(self, keys: np.ndarray, docs: np.ndarray) -> None:
        """keys (d, b) of the documents (d,)."""
        rows = np.empty(keys.size, _ROW)
        rows["key"], rows["doc"] = keys.reshape(-1), np.repeat(docs, keys.shape[1])
        part = (rows["key"] % np.uint64(PARTS)).astype(np.int64)
        rows = rows[np.argsort(part, kind="stable")]
        ends = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=PARTS))])
        for i, out in enumerate(self.outs):
            out.write(rows[ends[i] : ends[i + 1]].tobytes())

    def buckets(self) -> Iterator[np.ndarray]:
        """Documents (two or more, rising) that share a key; equal buckets of one partition once."""
        for file, out in zip(self.files, self.outs, strict=True):
            out.close()
            rows = np.fromfile(file, _ROW)
            rows = rows[np.lexsort((rows["doc"], rows["key"]))]
            if not len(rows):
                continue
            first = np.flatnonzero(np.concatenate([[True], rows["key"][1:] != rows["key"][:-1]]))
            seen: set[bytes] = set()
            for a, b in zip(first, np.append(first[1:], len(rows)), strict=True):
                if b - a > 1 and (name := rows["doc"][a:b].tobytes()) not in seen:
                    seen.add(name)
                    yield rows["doc"][a:b].copy()


class Shingles:
    """The sorted different shingles of every document, on disk."""

    def __init__(self, folder: Path):
        self.file = folder / "shingles"
        self.out = open(self.file, "wb")  # noqa: SIM115 - closed by close()
        self.sizes: list[np.ndarray] = []

    def add(self, shingles: np.ndarray, doc: np.ndarray, docs: int) -> None:
        """Shingles (s,) of a batch of documents; doc (s,) does not fall."""
        size = np.zeros(docs, np.int64)
        first = np.flatnonzero(np.diff(doc, prepend=-1, append=docs))
        for a, b in zip(first[:-1], first[1:], strict=True):
            mine = np.sort(shingles[a:b])
            mine = mine[np.concatenate([[True], mine[1:] != mine[:-1]])]
            size[doc[a]] = len(mine)
            self.out.write(mine.tobytes())
        self.sizes.append(size)

    def close(self) -> None:
        self.out.close()
        self.end = np.cumsum(np.concatenate([[0], *self.sizes])).astype(np.int64)
        self.all = np.memmap(self.file, np.uint64, "r") if self.end[-1] else np.empty(0, np.uint64)

    def of(self, doc: int) -> np.ndarray:
        return self.all[self.end[doc] : self.end[doc + 1]]

    def jaccard(self, a: int, b: int) -> float:
        """Exact similarity of two documents; 0 where one has no shingle."""
        x, y = self.of(a), self.of(b)
        if len(x) > len(y):
            x, y = y, x
        if not len(x):
            return 0.0
        place = np.minimum(np.searchsorted(y, x), len(y) - 1)
        both = int((y[place] == x).sum())
        return both / (len(x) + len(y) - both)


def edges(buckets: Iterator[np.ndarray], similar: Callable[[int, int], bool]) -> Iterator[tuple[int, int, bool]]:
    """Pairs (leader, document) of each bucket and whether they are similar; a document unlike all leaders becomes one.

    `similar(a, b)` decides; a pair is asked once.
    """
    known: dict[tuple[int, int], bool] = {}
    for bucket in buckets:
        leaders = [int(bucket[0])]
        for doc in map(int, bucket[1:]):
            for leader in leaders:
                pair = (leader, doc)
                if pair not in known:
                    known[pair] = similar(*pair)
                    yield leader, doc, known[pair]
                if known[pair]:
                    break
            else:
                if len(leaders) < LEADERS:
                    leaders.append(doc)


def labels(n: int, pairs: np.ndarray) -> np.ndarray:
    """For each of n documents the smallest document that is joined to it by pairs (e, 2), directly or through others."""
    label = np.arange(n)
    while len(pairs):
        low = np.minimum(label[pairs[:, 0]], label[pairs[:, 1]])
        new = label.copy()
        np.minimum.at(new, label[pairs[:, 0]], low)
        np.minimum.at(new, label[pairs[:, 1]], low)
        new = new[new]  # a short cut along the chain
        if np.array_equal(new, label):
            break
        label = new
    return label
