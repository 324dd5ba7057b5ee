"""Locally weighted regression: equal to statsmodels, blind to order, exact on lines."""

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.core.numbers.curves import Curve, lowess


@pytest.mark.parametrize("frac", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("it", [0, 3])
@pytest.mark.parametrize("delta", [0.0, 0.2])
@pytest.mark.parametrize("ties", [False, True])
def test_lowess_is_statsmodels(frac: float, it: int, delta: float, ties: bool) -> None:
    from statsmodels.nonparametric.smoothers_lowess import lowess as reference

    rng = np.random.default_rng(int(frac * 100) + it)
    x = rng.gamma(2.0, 2.0, 400)
    x = np.round(x, 1) if ties else x
    y = np.sin(x) + rng.standard_t(2, 400)
    theirs = reference(y, x, frac=frac, it=it, delta=delta)
    ours = lowess(x, y, frac=frac, it=it, delta=delta)
    assert np.abs(ours(theirs[:, 0]) - theirs[:, 1]).max() < 1e-9


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 30, 300).astype(float), rng.normal(size=300)
    p = rng.permutation(300)
    assert np.abs(lowess(x, y, frac=0.2).y - lowess(x[p], y[p], frac=0.2).y).max() < 1e-12


@pytest.mark.parametrize("frac", [0.2, 1.0])
def test_a_line_is_fitted_exactly(frac: float) -> None:
    x = np.random.default_rng(1).normal(1000, 300, 500)
    curve = lowess(x, 3 - 0.01 * x, frac=frac, it=0)
    assert np.abs(curve(x) - (3 - 0.01 * x)).max() < 1e-9


def test_lookup() -> None:
    curve = Curve(np.array([0.0, 1.0, 3.0]), np.array([0.0, 10.0, 30.0]))
    assert curve(np.array([-1.0, 0.5, 2.0, 9.0])).tolist() == [0, 5, 20, 30]
    assert curve.step(np.array([-1.0, 0.5, 1.0, 2.0, 9.0])).tolist() == [0, 10, 10, 30, 30]


def test_one_point_is_no_curve() -> None:
    with pytest.raises(UserError, match="equal"):
        lowess(np.ones(5), np.arange(5.0))
