"""Average precision of all neurons at once against its definition and scikit-learn."""

import numpy as np
import pytest

from modelwright.inspect.functions import precision
from modelwright.inspect.functions.precision import average_precision, predictivity


def by_hand(labels: np.ndarray, score: np.ndarray) -> float:
    """Sum over the different scores, from the highest: recall gained times precision so far."""
    total, before = 0.0, 0.0
    for t in sorted(set(score.tolist()), reverse=True):
        above = score >= t
        recall = (labels & above).sum() / labels.sum()
        total += (recall - before) * (labels & above).sum() / above.sum()
        before = recall
    return total


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(211, 30))
    return {
        "all different": x.astype(np.float32),
        "after a ReLU": np.maximum(x, 0).astype(np.float32),
        "ties everywhere": np.round(np.abs(x), 1).astype(np.float32),
        "ties, signed": np.round(x, 1).astype(np.float32),
        "ties, 64 bits": np.round(x, 1),
        "64 bits": x * 1e-300,
        "whole numbers": rng.integers(-3, 4, x.shape),
        "constant": np.zeros_like(x, np.float32),
        "zeros of both signs": np.where(x > 0, 0.0, -0.0).astype(np.float32),
        "transposed": np.asfortranarray(np.maximum(x, 0).astype(np.float32)),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_all_at_once_is_the_definition_column_by_column(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_BLOCK", 211 * 7)  # several blocks, the last one not full
    x = cases()[name]
    labels = np.random.default_rng(1).random(len(x)) < share
    ap, opposite = average_precision(x, labels)
    assert np.abs(ap - [by_hand(labels, c) for c in x.T]).max() < 1e-12
    assert np.abs(opposite - [by_hand(~labels, c) for c in x.T]).max() < 1e-12


@pytest.mark.parametrize("name", cases())
def test_equals_scikit_learn_with_ties(name: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x = cases()[name]
    labels = np.random.default_rng(2).random(len(x)) < 0.4
    ap, opposite = average_precision(x, labels)
    assert np.abs(ap - [metrics.average_precision_score(labels, c) for c in x.T]).max() < 1e-9
    assert np.abs(opposite - [metrics.average_precision_score(~labels, c) for c in x.T]).max() < 1e-9


def test_scores_are_not_changed() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    before = x.copy()
    average_precision(x, np.arange(50) % 2 == 0)
    assert np.array_equal(x, before)


def test_a_perfect_neuron_has_predictivity_one_for_either_label_and_a_constant_one_the_larger_share() -> None:
    labels = np.arange(40) < 10
    x = np.stack([labels * 2.0, 1.0 - labels, np.ones(40)], 1)
    assert predictivity(x, labels) == pytest.approx([1, 1, 0.75])


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both labels"):
        average_precision(np.ones((3, 2)), np.ones(3, bool))
