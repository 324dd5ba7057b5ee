"""MinHash signatures of batches, and the bands of locality-sensitive hashing.

A shingle x is a well-mixed 32-bit number. Permutation p sends it to (a_p x + b_p) mod 2^32, a_p odd, and the signature holds the
smallest of each document. For two documents the share of equal places is an unbiased estimate of their Jaccard similarity J with
a standard deviation of sqrt(J (1 - J) / k). b bands of r places each: a pair shares at least one band with the probability
P(J) = 1 - (1 - J^r)^b.
"""

from functools import cache

import numpy as np


@cache
def permutations(k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k odd factors and k offsets, uint32; the first of a larger k are the same."""
    rng = np.random.default_rng([seed, 0x5EED])
    both = rng.integers(0, 2**32, size=(k, 2), dtype=np.uint32)
    return both[:, 0] | np.uint32(1), both[:, 1].copy()


def sign(shingles: np.ndarray, doc: np.ndarray, docs: int, k: int = 128, seed: int = 0) -> np.ndarray:
    """Signatures (docs, k) uint32 of 64-bit shingles (s,) whose documents (s,) do not fall; all ones for a document without any."""
    out = np.full((docs, k), 0xFFFFFFFF, np.uint32)
    if not len(shingles):
        return out
    first = np.flatnonzero(np.diff(doc, prepend=-1))
    x = (shingles >> np.uint64(32)).astype(np.uint32)
    low, v = np.empty((k, len(first)), np.uint32), np.empty_like(x)
    for p, (a, b) in enumerate(zip(*permutations(k, seed), strict=True)):
        np.multiply(x, a, out=v)
        v += b
        np.minimum.reduceat(v, first, out=low[p])
    out[doc[first]] = low.T
    return out


def band_keys(signatures: np.ndarray, b: int, r: int) -> np.ndarray:
    """One 64-bit key (docs, b) per band of r places; equal bands have equal keys, and bands do not share keys."""
    keys = np.empty((len(signatures), b), np.uint64)
    for j in range(b):
        h = np.full(len(signatures), j + 1, np.uint64)
        for place in signatures[:, j * r : (j + 1) * r].T:
            h ^= place
            h *= np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(32)
        keys[:, j] = h
    return keys


def meets(similarity: np.ndarray | float, b: int, r: int) -> np.ndarray | float:
    """P(J): probability that a pair of this similarity shares a band."""
    return 1 - (1 - similarity**r) ** b


@cache
def choose(threshold: float, k: int, weight: float = 0.5) -> tuple[int, int]:
    """(b, r) with b r <= k that has the least weight * (area of P below the threshold) + (1 - weight) * (area of 1 - P above)."""
    x, w = np.polynomial.legendre.leggauss(64)
    below, above = threshold * (x + 1) / 2, threshold + (1 - threshold) * (x + 1) / 2
    best, found = np.inf, (1, 1)
    for r in range(1, k + 1):
        for b in range(1, k // r + 1):
            met, missed = w @ meets(below, b, r), w @ (1 - meets(above, b, r))
            wrong = float(weight * threshold / 2 * met + (1 - weight) * (1 - threshold) / 2 * missed)
            if wrong < best - 1e-12:
                best, found = wrong, (b, r)
    return found
