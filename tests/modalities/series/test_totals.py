"""Spreading totals over days: exact, and equal to known methods where they meet."""

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.modalities.series.daily import Days
from modelwright.modalities.series.totals import keys, label, ratios, spread, sums

RNG = np.random.default_rng(0)
KEY = np.repeat(np.arange(12), [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])


def test_every_total_is_met_to_1e_12() -> None:
    total = 10.0 ** RNG.uniform(-6, 9, 12)
    found = sums(spread(RNG.gamma(2, size=365), KEY, total), KEY)[1]
    assert np.abs(found / total - 1).max() < 1e-12


def test_a_constant_shape_is_the_flat_period() -> None:
    total = RNG.uniform(1, 2, 12)
    assert np.allclose(spread(np.ones(365), KEY, total), (total / np.bincount(KEY))[KEY], rtol=1e-15)


def test_scaling_all_totals_scales_every_day() -> None:
    shape, total = RNG.gamma(2, size=365), RNG.uniform(1, 2, 12)
    assert np.allclose(spread(shape, KEY, 8 * total), 8 * spread(shape, KEY, total), rtol=1e-14)


def test_a_constant_shape_equals_chow_lin_with_a_constant_indicator() -> None:
    """Chow and Lin (1971) with white noise: generalised least squares, then the rest of each total spread evenly."""
    total = RNG.uniform(1, 2, 12)
    c = (np.arange(12)[:, None] == KEY).astype(float)
    x = np.ones((365, 1))
    v = np.linalg.inv(c @ c.T)
    beta = np.linalg.solve(x.T @ c.T @ v @ c @ x, x.T @ c.T @ v @ total)
    chow_lin = x @ beta + c.T @ v @ (total - c @ x @ beta)
    assert np.allclose(spread(np.ones(365), KEY, total), chow_lin, rtol=1e-12)


def test_no_day_is_negative_and_a_total_of_zero_gives_zeros() -> None:
    total = np.ones(12)
    total[3] = 0
    found = spread(RNG.normal(size=365), KEY, total)
    assert found.min() >= 0 and (found[KEY == 3] == 0).all() and np.allclose(sums(found, KEY)[1], total)


def test_a_negative_total_is_refused() -> None:
    with pytest.raises(UserError, match="total 2 is -1"):
        spread(np.ones(365), KEY, np.array([1.0, -1.0] + [1.0] * 10))


def test_ratios_average_to_one_and_a_period_without_emissions_has_none() -> None:
    values = RNG.uniform(1, 2, 365)
    values[KEY == 5] = 0
    ratio, good = ratios(values, KEY)
    assert np.allclose([ratio[k == KEY].mean() for k in range(12) if k != 5], 1) and not good[KEY == 5].any() and good.sum() == 335


def test_keys_rise_with_group_and_time_and_carry_their_label() -> None:
    day = np.array(["1969-12-31", "1970-01-01", "2024-02-29", "1969-12-31"], "datetime64[D]").astype(np.int64)
    days = Days(day, np.ones(4), group=np.array([0, 0, 0, 1]), names=("a", "b"))
    for kind, names in (
        ("month", ["1969-12", "1970-01", "2024-02"]),
        ("quarter", ["1969-Q4", "1970-Q1", "2024-Q1"]),
        ("year", ["1969", "1970", "2024"]),
    ):
        key = keys(days, kind)
        assert (np.diff(key) > 0).all() and [label(int(k % 100_000) - 50_000, kind) for k in key[:3]] == names
    assert days.weekday.tolist() == [2, 3, 3, 2] and days.day_of_year.tolist() == [364, 0, 59, 364]
