"""Intervals and tests against scipy and closed forms."""

import numpy as np

from modelwright.core.numbers import stats


def test_wilson_covers_as_it_says() -> None:
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (3, 10), (499, 1000), (10, 10)):
        theirs = binomtest(hits, n).proportion_ci(method="wilson")
        assert np.allclose(stats.wilson(hits, n), (theirs.low, theirs.high))
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_exact_binomial() -> None:
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    for n in (5, 60, 900):
        a, b = rng.random(n) < 0.6, rng.random(n) < 0.7
        only = int((a & ~b).sum()), int((b & ~a).sum())
        assert np.isclose(stats.mcnemar(a, b), binomtest(min(only), sum(only)).pvalue)
    assert stats.mcnemar(np.ones(4, bool), np.ones(4, bool)) == 1.0


def test_spearman_is_scipy_s() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 200), rng.normal(size=200)
    assert np.isclose(stats.spearman(x, y), spearmanr(x, y).statistic)
    assert stats.spearman(np.ones(5), np.arange(5)) == 0.0


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = stats.bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert abs(low - (values.mean() - half)) < 0.02 and abs(high - (values.mean() + half)) < 0.02
    assert np.allclose(stats.bootstrap(2000, lambda i: values[i].mean()), (low, high), atol=0.02)
