"""Intervals and tests for recorded results, in numpy; 95 % everywhere unless a level is given."""

import math
from collections.abc import Callable

import numpy as np


def wilson(hits: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); half hits are allowed. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, scale = hits / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / scale, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    n: int, statistic: Callable[[np.ndarray], float], draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of `statistic(indices)` over resamples of n rows with replacement (Efron 1979)."""
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, n, n)) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray, draws: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), without materialising the resamples' indices."""
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    low, high = np.quantile(counts @ values / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p of McNemar's test: are a and b (n,) bool right on the same items equally often?"""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    log_half = n * math.log(0.5)
    tail = sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in range(k + 1))
    return min(1.0, 2 * tail)


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties get the mean of theirs."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; 0 when one side is constant."""
    a, b = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0
