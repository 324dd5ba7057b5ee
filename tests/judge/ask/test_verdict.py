"""Verdicts: reading, mapping between orders, what they are worth."""

import numpy as np
import pytest

from modelwright.core.numbers.stats import mcnemar
from modelwright.judge.ask.verdict import compare_ratings, differ, mean_interval, measure, parse_rating, parse_verdict, swap, swap_names

LABELS = np.array([1, 2, 2, 1, 1, 2, 1])


def test_swap_mapping_is_an_involution() -> None:
    verdicts = np.random.default_rng(0).integers(0, 3, (2, 50))
    assert (swap(swap(verdicts)) == verdicts).all() and (swap([0, 1, 2]) == [0, 2, 1]).all()


def test_swapping_the_names_in_an_explanation_is_an_involution() -> None:
    text = "Output (a) lists (a) to (b); output (b) does not. Therefore, Output (a) is better."
    assert swap_names(text) == "Output (b) lists (a) to (b); output (a) does not. Therefore, Output (b) is better."
    assert swap_names(swap_names(text)) == text


def test_a_judge_that_always_says_first_has_accuracy_50_and_agreement_0() -> None:
    found = measure(np.stack([np.ones(7, int), swap(np.ones(7, int))]), LABELS)
    assert (found["accuracy"], found["agreement"], found["by_place"]) == (50, 0, {"first": 100, "second": 0})


def test_a_perfect_judge_has_100_and_an_inverted_one_0_with_full_agreement() -> None:
    assert [measure(np.stack([v, v]), LABELS)[k] for v in (LABELS, swap(LABELS)) for k in ("accuracy", "agreement")] == [100, 100, 0, 100]


def test_unparsed_verdicts_are_wrong_and_agree_only_in_published_figures() -> None:
    verdicts = np.zeros((2, 7), int)
    for official, agreement in ((False, 0), (True, 100)):
        found = measure(verdicts, LABELS, official)
        assert (found["accuracy"], found["agreement"], found["unparsed"]) == (0, agreement, 100)
    half = np.stack([LABELS, np.where(np.arange(7) < 3, LABELS, 0)])
    assert measure(half, LABELS)["agreement"] == measure(half, LABELS, True)["agreement"] == pytest.approx(300 / 7)


def test_the_interval_of_a_mean_is_that_of_its_only_part_and_narrows_with_more() -> None:
    two = measure(np.array([[1, 1], [1, 1]]), np.array([1, 2]))
    assert two["accuracy"] == 50 and mean_interval([two]) == pytest.approx([9.453, 90.547], abs=1e-3)
    low, high = mean_interval([two] * 4)
    assert (low, high) == pytest.approx((50 - 40.547 / 2, 50 + 40.547 / 2), abs=1e-3)
    sure = measure(np.array([[1, 1], [1, 1]]), np.array([1, 1]))
    low, high = mean_interval([sure, sure])
    assert low == pytest.approx(100 - (100 - sure["accuracy_interval"][0]) / 2**0.5) and high == 100, "right twice is not sure"


def test_shares_by_place_agreement_and_unparsed_pairs_add_up() -> None:
    verdicts = np.random.default_rng(1).integers(1, 3, (2, 40))
    found = measure(verdicts, np.ones(40, int))
    assert found["agreement"] + sum(found["by_place"].values()) == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("Output (a)", 1, 1),
        ("Output (b)\n\nIt is shorter.", 2, 2),
        ("**Output (b)**", 2, 0),
        ("b", 2, 0),
        ("(A).", 1, 0),
        ("Output (a) and Output (b) are alike", 0, 1),
        ("Output (a)\nOutput (b)", 0, 1),
        ("I like the former", 0, 0),
        ("", 0, 0),
        ("a good question", 0, 0),
    ],
)
def test_direct_verdicts_are_read_strictly(text: str, strict: int, official: int) -> None:
    assert (parse_verdict(text, "direct"), parse_verdict(text, "direct", official=True)) == (strict, official)


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("It is right. Therefore, Output (b) is better.", 2, 2),
        ("Output (a) is better as it is shorter", 1, 1),
        ("Output (a) is better at first sight.\nAll in all, Output (b) is better.", 2, 1),
        ("Output (a) is better. Output (b) is better.", 0, 1),
        ("**Output (a)** is better", 1, 0),
        ("Neither is better", 0, 0),
    ],
)
def test_explained_verdicts_are_read_strictly(text: str, strict: int, official: int) -> None:
    assert (parse_verdict(text, "explained"), parse_verdict(text, "explained", official=True)) == (strict, official)


def test_a_tie_of_ratings_is_half_right_and_an_unread_one_is_unparsed() -> None:
    assert compare_ratings("7", "7") == compare_ratings("7", "7", official=True) == (2, 1)
    assert compare_ratings("8", "3") == (1, 1) and compare_ratings("3", "8") == (2, 2)
    assert compare_ratings("", "8") == (0, 0) and compare_ratings("", "8", official=True) == (1, 2)
    assert [parse_rating(t) for t in ("7", "Rating: 7/9", "7.", "10", "seven", "")] == [7, 7, 7, None, None, None]


def test_difference_between_judges_is_mcnemar_s_where_orders_agree() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(1, 3, 60)
    a, b = (np.where(rng.random(60) < p, labels, swap(labels)) for p in (0.9, 0.6))
    assert differ(np.stack([a, a]), np.stack([b, b]), labels) == mcnemar(a == labels, b == labels)
