"""Functional experts on planted and random neurons."""

import numpy as np
import pytest

from modelwright.inspect.functions.groups import (
    best_neurons,
    binomial_tail,
    functional_experts,
    hypergeometric_tail,
    overlap,
    random_partitions,
    threshold,
)

LABELS = np.arange(16).repeat(24)


def test_tails_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for total, size, drawn in ((3072, 192, 30), (40, 10, 40), (50, 50, 5), (20, 3, 7)):
        assert hypergeometric_tail(total, size, drawn) == pytest.approx(
            stats.hypergeom(total, size, drawn).sf(np.arange(drawn + 1)), abs=1e-10
        )
    for drawn, p in ((30, 1 / 16), (7, 0.9), (4, 1.0)):
        assert binomial_tail(drawn, p) == pytest.approx(stats.binom(drawn, p).sf(np.arange(drawn + 1)), abs=1e-10)


def test_the_papers_expert_needs_nine_of_its_thirty_best_neurons() -> None:
    tail = hypergeometric_tail(3072, 192, 30)
    t = threshold(tail, 0.001)
    assert tail[t] <= 0.001 < tail[t - 1]
    labels = np.arange(16).repeat(192)
    best = np.concatenate([np.arange(t), np.arange(200, 230 - t)])
    assert not functional_experts([best], labels).functional[0]  # t is not enough: strictly more
    best = np.concatenate([np.arange(t + 1), np.arange(200, 229 - t)])
    assert functional_experts([best], labels).functional[0]


def test_a_planted_expert_is_found_and_the_others_are_not() -> None:
    score = np.random.default_rng(0).random(384)
    score[LABELS == 5] += 1
    found = functional_experts([best_neurons(score, 0.05)], LABELS)
    assert np.flatnonzero(found.functional).tolist() == [5]
    assert found.degree == pytest.approx(16)  # all of them, where 1 in 16 is expected


def test_random_partitions_have_no_more_functional_experts_than_the_level_allows() -> None:
    score = np.random.default_rng(1).random(384)
    share, degree = random_partitions([best_neurons(score, 0.1)], LABELS, 0.001, 400, 0)
    assert share <= 0.001 and degree < 0.2
    share, _ = random_partitions([best_neurons(score, 0.1)], LABELS, 0.05, 400, 0)
    assert 0.005 < share <= 0.05


def test_no_functional_expert_has_degree_zero() -> None:
    assert functional_experts([np.arange(16) * 24], LABELS).degree == 0


def test_lists_of_sub_functions_are_pooled_with_a_binomial() -> None:
    lists = [np.array([5 * 24 + i, (i * 53) % 384, (i * 37) % 384]) for i in range(10)]
    found = functional_experts(lists, LABELS, 0.001)
    assert found.counts.sum() == 30 and found.functional[5]
    assert found.counts[5] > threshold(binomial_tail(30, 1 / 16), 0.001)


def test_experts_of_different_sizes_are_judged_by_their_own() -> None:
    labels = np.array([0] * 300 + [1] * 20)
    best = np.r_[np.arange(28), 300, 301]
    assert functional_experts([best], labels, 0.05).functional.tolist() == [False, False]
    best = np.r_[np.arange(20), 300:310]
    assert functional_experts([best], labels, 0.05).functional.tolist() == [False, True]


def test_ties_with_the_last_best_neuron_go_to_the_lower_index() -> None:
    assert best_neurons(np.array([1.0, 2, 2, 2, 0, 0, 0, 0, 0, 0]), 0.2).tolist() == [1, 2]
    assert best_neurons(np.ones(50), 0.001).tolist() == [0]


def test_overlap_is_the_share_of_common_best_neurons() -> None:
    a = np.arange(100.0)
    table = overlap([a, a, -a, np.r_[a[50:], a[:50]]], 40)
    assert table[0].tolist() == [1, 1, 0, 0] and np.array_equal(table, table.T)
