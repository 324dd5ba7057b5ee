"""Functional experts: groups of neurons that hold more of a function's best neurons than chance allows (arXiv 2305.18390).

The best `share` of the F neurons are counted by expert. With n neurons in an expert and N best ones, the count of a random
expert is hypergeometric(F, n, N); t is the smallest count with P(X > t) <= alpha, and an expert is functional if its count
exceeds t. For a function with several sub-functions their lists are pooled and the law is binomial(N, n / F).
Modularisation degree: mean over functional experts of count / (N n / F), 0 where there are none. Its control is the same
number for partitions of the same sizes at random.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Functional:
    """Counts (E,) of best neurons, which experts are functional (E,) bool, their share, and the modularisation degree."""

    counts: np.ndarray
    functional: np.ndarray
    degree: float

    @property
    def share(self) -> float:
        return float(self.functional.mean())


def best_neurons(score: np.ndarray, share: float) -> np.ndarray:
    """Indices of the int(F * share) highest scores, at least one; ties go to the lower index.

    The official code takes all scores above a threshold, which drops neurons that tie with it.
    """
    return np.argsort(-score, kind="stable")[: max(1, int(len(score) * share + 1e-9))]


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    inside = (k >= 0) & (k <= n)
    return np.array(
        [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) if ok else -math.inf for i, ok in zip(k, inside, strict=True)]
    )


def hypergeometric_tail(total: int, size: int, drawn: int) -> np.ndarray:
    """P(X > t) for t = 0 .. drawn: X of the `drawn` neurons out of `total` lie in an expert of `size`."""
    k = np.arange(drawn + 1)
    log = _log_choose(size, k) + _log_choose(total - size, drawn - k) - _log_choose(total, np.array([drawn]))
    return _tail(np.exp(log))


def binomial_tail(drawn: int, p: float) -> np.ndarray:
    """P(X > t) for t = 0 .. drawn of binomial(drawn, p)."""
    k = np.arange(drawn + 1)
    if p >= 1:
        return np.where(k < drawn, 1.0, 0.0)
    return _tail(np.exp(_log_choose(drawn, k) + k * math.log(p) + (drawn - k) * math.log1p(-p)))


def _tail(p: np.ndarray) -> np.ndarray:
    return np.append(np.cumsum(p[::-1])[::-1][1:], 0.0)


def threshold(tail: np.ndarray, alpha: float) -> int:
    """The smallest t with P(X > t) <= alpha."""
    return int(np.flatnonzero(tail <= alpha)[0])


def functional_experts(best: list[np.ndarray], labels: np.ndarray, alpha: float = 0.001) -> Functional:
    """The functional experts for one list of best neurons, or for several lists pooled; labels (F,) name each neuron's expert."""
    sizes, total = np.bincount(labels), len(labels)
    picked = np.concatenate(best)
    counts, drawn = np.bincount(labels[picked], minlength=len(sizes)), len(picked)
    limit = {}
    for size in set(sizes.tolist()):
        tail = hypergeometric_tail(total, size, drawn) if len(best) == 1 else binomial_tail(drawn, size / total)
        limit[size] = threshold(tail, alpha)
    functional = counts > np.array([limit[s] for s in sizes.tolist()])
    expected = np.maximum(drawn * sizes / total, 1e-300)
    degree = float((counts / expected)[functional].mean()) if functional.any() else 0.0
    return Functional(counts, functional, degree)


def random_partitions(best: list[np.ndarray], labels: np.ndarray, alpha: float, draws: int, seed: int) -> tuple[float, float]:
    """Mean share of functional experts and mean modularisation degree over random partitions of the same sizes."""
    rng = np.random.default_rng(seed)
    found = [functional_experts(best, rng.permutation(labels), alpha) for _ in range(draws)]
    return float(np.mean([f.share for f in found])), float(np.mean([f.degree for f in found]))


def overlap(scores: list[np.ndarray], top: int = 32) -> np.ndarray:
    """Share of common neurons among the `top` best of each pair of sub-functions (n, n); chance is top / F."""
    sets = [set(np.argsort(-s, kind="stable")[:top].tolist()) for s in scores]
    return np.array([[len(a & b) / top for b in sets] for a in sets])
