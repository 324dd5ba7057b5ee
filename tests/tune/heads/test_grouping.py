"""Groups of heads and budgets: planted groups are found, the budget is met exactly at the least cost."""

import itertools

import numpy as np
import pytest

from modelwright.tune.heads.grouping import grouped, spend, spend_greedily, within


def costs(m: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).random((m, m))
    return (x + x.T) * (1 - np.eye(m))


@pytest.mark.parametrize("equal", [False, True])
def test_planted_groups_are_found_wherever_their_heads_stand(equal: bool) -> None:
    planted = np.array([0, 1, 0, 2, 1, 2, 2, 1, 0] if equal else [0, 1, 0, 0, 0, 2, 0, 1, 0])
    cost = np.where(planted[:, None] == planted[None], 0.01, 1.0)
    assert grouped(cost, 3, equal).tolist() == planted.tolist()


def test_groups_have_one_size_where_that_is_asked_for() -> None:
    for seed in range(5):
        assert np.bincount(grouped(costs(12, seed), 4, equal=True)).tolist() == [3, 3, 3, 3]


def test_no_move_and_no_swap_of_single_heads_is_better() -> None:
    for seed in range(5):
        cost = costs(7, seed)
        labels = grouped(cost, 3)
        assert set(labels) == {0, 1, 2}
        for i, g in itertools.product(range(7), range(3)):
            other = labels.copy()
            other[i] = g
            if len(set(other)) == 3:
                assert within(cost, other) >= within(cost, labels) - 1e-12
        for i, j in itertools.combinations(range(7), 2):
            other = labels.copy()
            other[i], other[j] = labels[j], labels[i]
            assert within(cost, other) >= within(cost, labels) - 1e-12


def test_every_number_of_groups_is_made_and_the_ends_are_plain() -> None:
    cost = costs(6, 0)
    assert grouped(cost, 6).tolist() == list(range(6)) and grouped(cost, 1).tolist() == [0] * 6
    assert [len(set(grouped(cost, n))) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_the_budget_is_met_exactly_at_the_least_cost_of_all() -> None:
    g = np.random.default_rng(0)
    for _ in range(10):
        table = [list(g.random(4)) for _ in range(4)]  # not convex: greedy can err
        for budget in range(4, 17):
            found = spend(table, budget)
            ways = [w for w in itertools.product(range(1, 5), repeat=4) if sum(w) == budget]
            total = lambda w, t=table: sum(t[i][n - 1] for i, n in enumerate(w))  # noqa: E731
            assert sum(found) == budget
            assert total(found) == pytest.approx(min(map(total, ways)))
            assert total(found) <= total(spend_greedily(table, budget)) + 1e-12


def test_a_budget_that_nothing_can_meet_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 heads"):
        spend([[1.0, 0.0], [1.0, 0.0]], 1)
