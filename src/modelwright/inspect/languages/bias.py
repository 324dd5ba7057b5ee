"""Stereotypes in a model: associations of vectors (WEAT, SEAT), preferred sentences (CrowS-Pairs), and StereoSet's scores."""

import math
from itertools import combinations

import numpy as np

from modelwright.inspect.languages.space import Matrix, likeness

EXACT, DRAWN = 20_000, 10_000  # partitions up to which the test is exact, and those drawn where there are more


def associations(words: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """s(w) = mean cosine to A - mean cosine to B."""
    return likeness(words, a).mean(1) - likeness(words, b).mean(1)


def weat(x: Matrix, y: Matrix, a: Matrix, b: Matrix) -> float:
    """Effect size: (mean s over X - mean s over Y) / standard deviation of s over both."""
    of_x, of_y = associations(x, a, b), associations(y, a, b)
    spread = np.concatenate([of_x, of_y]).std(ddof=1)
    return float((of_x.mean() - of_y.mean()) / spread) if spread > 1e-12 else 0.0


def weat_p(x: Matrix, y: Matrix, a: Matrix, b: Matrix, seed: int = 0) -> tuple[float, bool]:
    """Share of the ways to part X and Y anew whose difference is at least as large, one-sided; and whether all ways were counted."""
    s = np.concatenate([associations(x, a, b), associations(y, a, b)])
    n, total = len(x), s.sum()

    def difference(of_x: np.ndarray) -> np.ndarray:
        return of_x / n - (total - of_x) / (len(s) - n)

    seen = difference(np.array([s[:n].sum()]))[0]
    exact = math.comb(len(s), n) <= EXACT
    if exact:
        parts = np.array(list(combinations(range(len(s)), n)))
    else:
        keys = np.random.default_rng(seed).random((DRAWN, len(s)), np.float32)
        keys[0, :n], keys[0, n:] = 0, 1  # what was seen is one of the ways
        parts = keys.argpartition(n - 1, axis=1)[:, :n]
    sums = s[parts].sum(1)
    return float((difference(sums) >= seen - 1e-12).mean()), exact


def preferred(more: np.ndarray, less: np.ndarray) -> float:
    """Percent of pairs whose stereotyped sentence is the more likely one; a tie counts half. 50 is even-handed."""
    return float(100 * ((more > less) + 0.5 * (more == less)).mean())


def icat(lms: float, ss: float) -> float:
    """StereoSet's idealised score: lms * min(ss, 100 - ss) / 50."""
    return lms * min(ss, 100 - ss) / 50


def stereoset(scores: np.ndarray) -> tuple[float, float]:
    """(lms, ss) in percent from log-likelihoods (n, 3) of the stereotype, its opposite, and a meaningless sentence."""
    stereo, anti, unrelated = scores.T
    lms = 100 * ((stereo > unrelated).mean() + (anti > unrelated).mean()) / 2
    return float(lms), preferred(stereo, anti)
