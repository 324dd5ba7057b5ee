"""The hinge: recovered where planted, and its resamples beside a plain loop."""

import numpy as np
import pytest

from modelwright.modalities.series.hinge import _counts, _profile, arms, bootstrap, fit, grid


def planted(c: float, below: float, above: float, noise: float = 0.0, n: int = 700, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(15, 6, n)
    z = np.column_stack([np.ones(n), np.arange(n) % 7 == 0, np.arange(n) % 7 == 1]).astype(float)
    return x, arms(x, c)[:, 0] @ [below, above] + z @ [3.0, -0.5, -0.7] + noise * rng.normal(size=n), z


@pytest.mark.parametrize(("c", "below", "above"), [(17.3, -2.0, 3.0), (11.0, -0.1, 0.4), (14.2, 1.0, 2.0)])
def test_a_planted_hinge_is_recovered_exactly(c: float, below: float, above: float) -> None:
    found = fit(*planted(c, below, above))
    assert np.allclose([found.c, found.below, found.above], [c, below, above], atol=1e-6) and found.r2 > 1 - 1e-12
    assert found.is_v == (below < 0 < above)


def test_scale_and_shift_of_y_leave_the_breakpoint() -> None:
    x, y, z = planted(16.0, -1.0, 2.0, noise=1.0)
    one, two = fit(x, y, z), fit(x, 50 * y + 7, z)
    assert one.c == pytest.approx(two.c, abs=1e-6) and two.below == pytest.approx(50 * one.below, rel=1e-6)


def test_each_profile_value_is_the_least_squares_of_that_breakpoint() -> None:
    x, y, z = planted(16.0, -1.0, 2.0, noise=2.0)
    q, _ = np.linalg.qr(z)
    at = grid(x)[::30]
    rss, slopes = _profile(x, y - q @ (q.T @ y), q, at)
    for c, r, s in zip(at, rss, slopes, strict=True):
        whole = np.column_stack([z, arms(x, c)[:, 0]])
        b, left, *_ = np.linalg.lstsq(whole, y, rcond=None)
        assert r == pytest.approx(left[0], rel=1e-9) and np.allclose(s, b[-2:], rtol=1e-8)


def test_resamples_solved_from_sums_equal_a_loop_over_repeated_rows() -> None:
    x, y, z = planted(16.0, -1.0, 2.0, noise=2.0, n=200)
    found = bootstrap(x, y, z, draws=5, block=10, seed=3)
    rng = np.random.default_rng(3)
    for row in found:
        rows = np.repeat(np.arange(200), _counts(200, 10, rng).astype(int))
        best = None
        for c in grid(x):
            whole = np.column_stack([z[rows], arms(x[rows], c)[:, 0]])
            b, left, *_ = np.linalg.lstsq(whole, y[rows], rcond=None)
            if best is None or left[0] < best[0]:
                best = (left[0], c, *b[-2:])
        assert np.allclose(row, best[1:], rtol=1e-6)


def test_blocks_widen_the_interval_of_dependent_days() -> None:
    rng = np.random.default_rng(0)
    n = 700
    drift = np.zeros(n)
    for i in range(1, n):
        drift[i] = 0.95 * drift[i - 1] + rng.normal()
    x = 15 + 8 * np.sin(np.arange(n) / 58) + rng.normal(size=n)
    y = arms(x, 15.0)[:, 0] @ [-1.0, 1.0] + drift
    width = {b: np.ptp(np.quantile(bootstrap(x, y, np.ones((n, 1)), draws=200, block=b, seed=0)[:, 0], [0.025, 0.975])) for b in (1, 28)}
    assert width[28] > 1.3 * width[1]


def test_a_column_that_a_resample_lacks_does_not_break_it() -> None:
    x, y, z = planted(16.0, -1.0, 2.0, noise=1.0, n=200)
    z = np.column_stack([z, np.arange(200) == 5])
    assert np.isfinite(bootstrap(x, y, z, draws=50, block=20, seed=0)).all()
