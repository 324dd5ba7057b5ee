"""BM25 over shards on disk, with the statistics of the whole collection.

score(D, Q) = sum over the query's terms t of n(t, Q) idf(t) f(t, D) (k1 + 1) / (f(t, D) + k1 (1 - b + b |D| / mean |D|))
idf(t) = ln(1 + (N - df(t) + .5) / (df(t) + .5)), never below 0 (Lucene's form).

A term is a word of kernels/words.py that is no stop word and has two or more characters; a character of a script without spaces is a
term by itself. N, df and the mean length are those of all shards together, and terms are added in the same order everywhere: a
document has the same score, to the last bit, however the collection is cut. Equal scores are ordered by document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from modelwright.curate.kernels.words import words

STOP = (  # Lucene's English list
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with"
)


@cache
def _stop() -> np.ndarray:
    return np.sort(words([STOP]).hash)


def terms(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (t,) uint64 of the terms of all texts in order, and the text (t,) of each."""
    w = words(texts)
    keep = (w.end - w.start > 1) & ~np.isin(w.hash, _stop())  # a character beyond ASCII has two bytes or more
    return w.hash[keep], w.doc[keep]


@dataclass(frozen=True)
class Shard:
    """Postings of some documents: those of term i are `doc` and `count` from `place[i]` to `place[i + 1]`."""

    term: np.ndarray  # (t,) uint64, sorted
    place: np.ndarray  # (t + 1,) int64
    doc: np.ndarray  # (p,) int32, rising within a term; counted from `first`
    count: np.ndarray  # (p,) int32
    length: np.ndarray  # (docs,) int32, terms in each document
    first: int  # number of its first document

    def postings(self, term: np.uint64) -> slice:
        i = int(np.searchsorted(self.term, term))
        found = i < len(self.term) and self.term[i] == term
        return slice(int(self.place[i]), int(self.place[i + 1])) if found else slice(0, 0)


def shard(hashes: np.ndarray, doc: np.ndarray, docs: int, first: int = 0) -> Shard:
    """The postings of `docs` documents from their terms (t,) and the document of each."""
    order = np.lexsort((doc, hashes))
    h, d = hashes[order], doc[order]
    new = np.flatnonzero(np.concatenate([[True], (h[1:] != h[:-1]) | (d[1:] != d[:-1])])[: len(h)])
    count = np.diff(np.append(new, len(h))).astype(np.int32)
    h, d = h[new], d[new].astype(np.int32)
    begins = np.flatnonzero(np.concatenate([[True], h[1:] != h[:-1]])[: len(h)])
    length = np.bincount(doc, minlength=docs).astype(np.int32)
    return Shard(h[begins], np.append(begins, len(h)), d, count, length, first)


class Index:
    """Shards that are added one after the other and lie in `folder`; without a folder they stay in memory."""

    def __init__(self, folder: Path | None = None, *, k1: float = 1.2, b: float = 0.75, most_terms: int = 64):
        self.folder, self.k1, self.b, self.most_terms = folder, k1, b, most_terms
        self.shards: list[Shard] = []
        self.docs = self.terms = 0

    def add(self, texts: list[str]) -> None:
        """One more shard, whose documents count on from the last one's."""
        self.add_terms(*terms(texts), len(texts))

    def add_terms(self, hashes: np.ndarray, doc: np.ndarray, docs: int) -> None:
        made = shard(hashes, doc, docs, self.docs)
        self.docs += docs
        self.terms += len(hashes)
        self.shards.append(self._on_disk(made) if self.folder else made)

    def _on_disk(self, made: Shard) -> Shard:
        assert self.folder is not None
        parts = {}
        for name in ("term", "place", "doc", "count", "length"):
            file = self.folder / f"{len(self.shards):05d}-{name}.npy"
            np.save(file, getattr(made, name))
            whole = getattr(made, name).size > 0  # an empty file cannot be mapped
            parts[name] = np.load(file, mmap_mode="r" if whole else None)
        return Shard(**parts, first=made.first)

    def weights(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """The query's terms and what each counts: n(t, Q) idf(t). Of a long query the `most_terms` rarest; terms without a document
        are left out."""
        term, times = np.unique(terms([query])[0], return_counts=True)
        df = np.zeros(len(term))
        for s in self.shards:
            spans = [s.postings(t) for t in term]
            df += np.array([span.stop - span.start for span in spans], np.float64)
        idf = np.log(1 + (self.docs - df + 0.5) / (df + 0.5))
        rare = np.lexsort((term, -idf))
        rare = np.sort(rare[df[rare] > 0][: self.most_terms])
        return term[rare], (times * idf)[rare]

    def search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k documents and their scores, best first; documents without any term of the query never."""
        term, weight = self.weights(query)
        found, scores = [np.empty(0, np.int64)], [np.empty(0)]
        for s in self.shards:
            d, v = _best(*self._scores(s, term, weight), k)
            found.append(d + s.first)
            scores.append(v)
        return _best(np.concatenate(found), np.concatenate(scores), k)

    def _scores(self, s: Shard, term: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a shard that hold a term, and their scores."""
        spans: Sequence[slice] = [s.postings(t) for t in term]
        doc = np.concatenate([s.doc[x] for x in spans] or [np.empty(0, np.int32)])
        f = np.concatenate([s.count[x] for x in spans] or [np.empty(0, np.int32)]).astype(np.float64)
        each = np.repeat(weight, [x.stop - x.start for x in spans])
        norm = self.k1 * (1 - self.b + self.b * s.length[doc] * (self.docs / max(self.terms, 1)))
        total = np.bincount(doc, each * f * (self.k1 + 1) / (f + norm), len(s.length))  # adds in the order of the terms
        some = np.unique(doc).astype(np.int64)
        return some, total[some]


def _best(doc: np.ndarray, score: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if len(doc) > k:
        last = np.partition(score, len(score) - k)[len(score) - k]
        doc, score = doc[score >= last], score[score >= last]
    order = np.lexsort((doc, -score))[:k]
    return doc[order], score[order]
