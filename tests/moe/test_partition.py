"""Exact balanced assignment and balanced k-means."""

import numpy as np
import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.moe.partition import balanced_assign, balanced_kmeans, even_sizes, group_means


@pytest.mark.parametrize("seed", range(6))
def test_the_assignment_is_optimal(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    sizes = [[12] * 8, [5, 20, 31, 1, 9], [40, 40], [1] * 30, [3, 0, 9], [7] * 12][seed]
    cost = np.round(rng.normal(size=(sum(sizes), len(sizes))), 1 if seed % 2 else 6)  # with ties, without
    label = balanced_assign(cost, sizes)
    assert np.bincount(label, minlength=len(sizes)).tolist() == sizes
    wide = np.repeat(cost, sizes, 1)
    row, column = optimize.linear_sum_assignment(wide)
    assert cost[np.arange(len(cost)), label].sum() == pytest.approx(wide[row, column].sum(), abs=1e-9)


def test_ties_go_to_the_lower_index() -> None:
    assert balanced_assign(np.zeros((6, 3)), [2, 2, 2]).tolist() == balanced_assign(np.zeros((6, 3)), [2, 2, 2]).tolist()
    assert np.bincount(balanced_assign(np.zeros((6, 3)), [1, 2, 3])).tolist() == [1, 2, 3]


def test_planted_groups_are_found() -> None:
    centres = torch.nn.functional.normalize(torch.randn(6, 24), dim=1)
    planted = torch.arange(6).repeat_interleave(10)[torch.randperm(60)]
    label, found, inertia = balanced_kmeans(centres[planted] * 3 + 0.02 * torch.randn(60, 24), 6)
    assert len({(int(a), int(b)) for a, b in zip(label, planted, strict=True)}) == 6
    assert inertia < 1 and found.shape == (6, 24)


def test_groups_are_even_and_centres_are_the_means_of_the_labels() -> None:
    x = torch.randn(48, 8)
    label, centres, inertia = balanced_kmeans(x, 4, rounds=3)
    unit = torch.nn.functional.normalize(x, dim=1)
    assert torch.bincount(label).tolist() == [12] * 4
    torch.testing.assert_close(centres, group_means(unit, label, 4))
    assert inertia == pytest.approx(float((unit - centres[label]).pow(2).sum()))


def test_more_rounds_are_never_worse_and_a_start_from_the_result_stays() -> None:
    x = torch.randn(96, 12)
    inertia = [balanced_kmeans(x, 8, rounds=r)[2] for r in (1, 2, 4, 20)]
    assert all(a >= b - 1e-6 for a, b in zip(inertia, inertia[1:], strict=False))
    label = balanced_kmeans(x, 8, rounds=50)[0]
    assert torch.equal(balanced_kmeans(x, 8, rounds=50, labels=label)[0], label)


def test_equal_rows_are_split_evenly_too() -> None:
    label = balanced_kmeans(torch.ones(24, 4).bfloat16(), 4)[0]
    assert torch.bincount(label).tolist() == [6] * 4


def test_neurons_that_do_not_divide_are_refused_with_near_numbers() -> None:
    with pytest.raises(UserError, match="172 neurons do not divide into 8 experts.*try 2, 4, 43, 86|try 2, 4"):
        even_sizes(172, 8)
