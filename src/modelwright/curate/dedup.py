"""Exact and near-duplicates: one copy of each stays, chosen by a rule, and each removal names the copy that stayed.

When to use it: before training on text from the web, or from any source that repeats itself.

Paper: WanJuan-CC (arXiv 2402.19282), the third stage of its funnel, which removed 90.2 % of its documents. There is no official
code. Word 5-grams, 128 hash functions and a threshold of 0.7 are those of the same team's report 2403.17297, from memory.

1. Exact: equal after everything but letters, digits and marks is taken out and capitals are made small.
2. Near: MinHash signatures of word n-grams (kernels/minhash.py); b bands of r places are chosen so that the two wrong areas under
   P(J) = 1 - (1 - J^r)^b are smallest; documents that share a band are candidates.
3. Verified: the exact Jaccard similarity of the candidates' n-grams must reach the threshold (`verify`).
4. Clusters are the connected pairs, by labels that travel along them. Of each cluster the newest document stays, then the longest,
   then the one that comes first (`keep`): the result does not depend on how the input is cut into files or batches.

Ours: a hash family that is one (a x + b modulo 2^61 - 1 with an overflow at 2^64, as others compute it, is not); a document of fewer
than n words has no n-grams and is only compared exactly (others leave it out, or make all of them one cluster); and the share of
removed documents that are below the threshold to the one that stayed, since clusters are chains: a like b, b like c, a unlike c.

Memory: signatures are dropped as soon as their bands are on disk. What stays in memory is 40 bytes a document.
"""

import hashlib
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.curate.kernels.clusters import Keys, Shingles, edges, labels
from modelwright.curate.kernels.documents import PLACE, Sink, Source
from modelwright.curate.kernels.minhash import band_keys, choose, meets, sign
from modelwright.curate.kernels.words import Words, ngrams, words


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "documents: jsonl, jsonl.gz, parquet, csv, text, or a folder of them; every column is kept")
    threshold: float = knob(0.7, "Jaccard similarity of n-grams from which two documents are the same", low=0.05, high=1)
    n: int = knob(5, "words per n-gram", low=1)
    hashes: int = knob(128, "hash functions", low=1, high=4096)
    bands: list[int] = knob([], "bands and places per band, such as [14, 8]; empty: chosen from hashes and threshold")
    verify: bool = knob(True, "compare candidates exactly; else a shared band is enough")
    keep: Literal["newest", "longest", "first"] = knob("newest", "which document of a cluster stays; ties: longest, then first")
    date: str = knob("date", "column of dates for keep: newest; documents without one count as oldest")
    near: bool = knob(True, "look for near-duplicates; else exact ones only")


@dataclass
class Marks:
    """What is remembered of every document: exact key, length, date and number of n-grams."""

    exact: list[bytes]
    length: list[int]
    date: list[str]


def exact_keys(w: Words, texts: list[str]) -> list[bytes]:
    """16 bytes per document that are equal where the letters, digits and marks are; where the text is, if it has none of them."""
    change = np.zeros(len(w.data) + 1, np.int8)
    change[w.start] += 1
    change[w.end] -= 1  # a word that starts where another ends cancels out
    kept = w.data[np.cumsum(change[:-1], dtype=np.int8) > 0].tobytes()
    size = np.bincount(w.doc, w.end - w.start, w.docs).astype(np.int64)
    spans = zip((np.cumsum(size) - size).tolist(), np.cumsum(size).tolist(), texts, strict=True)
    return [_digest(kept[a:b]) if b > a else _digest(b"\n" + text.encode("utf-8", "replace")) for a, b, text in spans]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def rank(marks: Marks, keep: str) -> np.ndarray:
    """Place of each document in the order of who stays, 0 first; no two are equal."""
    n = len(marks.length)
    length = -np.asarray(marks.length)
    if keep == "first":
        return np.arange(n)
    order = np.lexsort((np.arange(n), length))
    if keep == "newest":
        age = np.unique(np.asarray(marks.date, object).astype(str), return_inverse=True)[1]
        order = np.lexsort((np.arange(n), length, -age))
    out = np.empty(n, np.int64)
    out[order] = np.arange(n)
    return out


def scan(source: Source, knobs: Knobs, b: int, r: int, keys: Keys, shingles: Shingles, seed: int) -> Marks:
    """First pass: bands and n-grams to disk, the rest remembered."""
    marks = Marks([], [], [])
    for batch in source:
        texts = batch.column(source.column).to_pylist()
        w = words(texts)
        marks.exact += exact_keys(w, texts)
        marks.length += map(len, texts)
        dates = batch.column(knobs.date).to_pylist() if knobs.date in batch.schema.names else [""] * len(texts)
        marks.date += ["" if d is None else str(d) for d in dates]
        if knobs.near:
            s, doc = ngrams(w, knobs.n)
            first = np.asarray(batch.column(PLACE))[0]
            some = np.unique(doc)
            keys.add(band_keys(sign(s, doc, w.docs, b * r, seed)[some], b, r), some + first)
            shingles.add(s, doc, w.docs)
    return marks


def cluster(marks: Marks, knobs: Knobs, keys: Keys, shingles: Shingles) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Cluster label of each document, whether it has an exact twin before it, and counts."""
    n = len(marks.exact)
    first: dict[bytes, int] = {}
    twin = np.array([first.setdefault(k, i) for i, k in enumerate(marks.exact)], np.int64)
    exact = np.flatnonzero(twin != np.arange(n))
    pairs = [np.stack([twin[exact], exact], 1)]
    counts = {"candidate pairs": 0, "verified pairs": 0}
    if knobs.near:
        shingles.close()
        found = []

        def similar(a: int, b: int) -> bool:
            return bool(twin[a] == twin[b]) or not knobs.verify or shingles.jaccard(a, b) >= knobs.threshold

        for a, b, same in edges(keys.buckets(), similar):
            counts["candidate pairs"] += 1
            counts["verified pairs"] += int(same)
            if same:
                found.append((a, b))
        pairs.append(np.array(found, np.int64).reshape(-1, 2))
    return labels(n, np.concatenate(pairs)), twin, counts


def dedup(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write dataset.jsonl (the documents that stay, with `copies`) and removed.jsonl (row, reason, kept row, similarity)."""
    if knobs.bands and (len(knobs.bands) != 2 or min(knobs.bands) < 1):
        raise UserError(f"bands={knobs.bands} does not fit", "bands and places per band are needed", "write bands: [14, 8]")
    b, r = knobs.bands or choose(knobs.threshold, knobs.hashes)
    source = Source(knobs.data)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        keys, shingles = Keys(Path(work)), Shingles(Path(work))
        marks = scan(source, knobs, b, r, keys, shingles, seed)
        label, twin, counts = cluster(marks, knobs, keys, shingles)
        order = rank(marks, knobs.keep)
        survivor = _survivors(label, order)
        removed = _removed(survivor, marks, shingles if knobs.near else None)
    with open(folder / "removed.jsonl", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in removed)
    copies = np.bincount(survivor, minlength=len(survivor))
    with Sink(folder / "dataset.jsonl") as sink:
        for batch in source:
            rows = (row | {"copies": int(copies[row[PLACE]])} for row in batch.to_pylist() if survivor[row[PLACE]] == row[PLACE])
            sink.write(rows, source.column)
    why = Counter(row["reason"] for row in removed)
    middle, at = (1 - 0.5 ** (1 / b)) ** (1 / r), 100 * float(meets(knobs.threshold, b, r))
    far = sum(row["similarity"] < knobs.threshold for row in removed if row["reason"] == "near")
    return {
        "documents": len(label),
        "kept": sink.rows,
        "removed": len(removed),
        "exact": why["exact"],
        "near": why["near"],
        "near, below the threshold to the one kept": far,
        **counts,
        "bands": f"{b} of {r} places; half of the pairs of similarity {middle:.2f} meet, {at:.0f} % at the threshold",
        "cluster sizes": _sizes(copies),
        **{f"dropped: {k}": v for k, v in source.dropped.items()},
    }


def _survivors(label: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each document the one of its cluster that stays."""
    by = np.lexsort((order, label))
    first = np.flatnonzero(np.concatenate([[True], label[by][1:] != label[by][:-1]]))
    best = np.empty(len(label), np.int64)
    best[label[by][first]] = by[first]
    return best[label]


def _removed(survivor: np.ndarray, marks: Marks, shingles: Shingles | None) -> list[dict[str, Any]]:
    rows = []
    for doc in np.flatnonzero(survivor != np.arange(len(survivor))).tolist():
        kept = int(survivor[doc])
        if marks.exact[doc] == marks.exact[kept]:
            rows.append({"row": doc, "reason": "exact", "kept": kept, "similarity": 1.0})
        else:
            rows.append(
                {"row": doc, "reason": "near", "kept": kept, "similarity": round(shingles.jaccard(doc, kept), 4) if shingles else 0.0}
            )
    return rows


def _sizes(copies: np.ndarray) -> str:
    found = Counter(copies[copies > 0].tolist())
    shown = [f"{found[s]} of {s}" for s in sorted(found)[:6]]
    more = sum(found[s] for s in sorted(found)[6:])
    return ", ".join(shown) + (f", {more} larger, up to {max(found)}" if more else "")


METHOD = dedup
