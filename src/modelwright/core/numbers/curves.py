"""Smooth curves through scattered points: locally weighted regression, fitted once and then looked up.

LOWESS is Cleveland's (JASA 1979): at each x a line through the nearest frac * n points, tricube weights by distance,
bisquare weights by residual in `it` further rounds. Points of equal x are summed first, so the cost depends on the
number of different x and the result on no order. tests/core/numbers/test_curves.py compares with statsmodels to 1e-9.
"""

from dataclasses import dataclass

import numpy as np

from modelwright.core.errors import UserError

_BLOCK = 8192


@dataclass(frozen=True)
class Curve:
    """Knots x (m,) strictly rising and heights y (m,)."""

    x: np.ndarray
    y: np.ndarray

    def __call__(self, q: np.ndarray) -> np.ndarray:
        """Heights at q by linear interpolation; flat beyond the ends."""
        return np.interp(q, self.x, self.y)

    def step(self, q: np.ndarray) -> np.ndarray:
        """The height at the first knot not below q; the last knot's beyond the end."""
        return self.y[np.minimum(np.searchsorted(self.x, q, side="left"), len(self.x) - 1)]


def lowess(x: np.ndarray, y: np.ndarray, *, frac: float = 2 / 3, it: int = 3, delta: float = 0.0) -> Curve:
    """Locally weighted regression of y (n,) on x (n,); one knot for each x where a line was fitted: all different x, or
    with `delta` the sparse ones between which heights are interpolated.

    frac: share of the points under each line. it: rounds of robust reweighting. delta: within this distance (in units of
    x) of the last fitted x, heights are interpolated. Raises UserError when all x are equal.
    """
    if not len(x) or x.min() == x.max():
        raise UserError(f"all {len(x)} feature values are equal", "no curve can be fitted over one point", "drop the feature")
    order = np.argsort(x, kind="stable")
    x, y = np.asarray(x, np.float64)[order], np.asarray(y, np.float64)[order]
    n = len(x)
    k = min(max(int(frac * n + 1e-10), 2), n)
    knots, first, of = np.unique(x, return_index=True, return_inverse=True)
    anchors = _anchors(knots, x, delta)
    at = knots[anchors]
    left = np.searchsorted(x[: n - k] + x[k:], 2 * at)  # the window of k nearest points starts here
    radius = np.maximum(at - x[left], x[left + k - 1] - at)
    low, high = np.searchsorted(knots, at - radius), np.searchsorted(knots, at + radius, side="right")
    robust = np.ones(n)
    scale_x = np.ptp(knots)
    z = (knots - knots.mean()) / scale_x  # sums of squares stay well conditioned
    for turn in range(it + 1):
        mass, moment = np.add.reduceat(robust, first), np.add.reduceat(robust * y, first)
        sums = np.stack([mass, mass * z, mass * z * z, moment, moment * z], 1)
        heights = np.array([_line(z[a:b], sums[a:b], z[i], r / scale_x) for a, b, i, r in zip(low, high, anchors, radius, strict=True)])
        if hole := np.flatnonzero(np.isnan(heights)).tolist():  # every neighbour was an outlier: its own mean
            ends = np.append(first, n)
            heights[hole] = [y[ends[anchors[i]] : ends[anchors[i] + 1]].mean() for i in hole]
        fitted = np.interp(knots, at, heights)
        if turn < it:
            rest = np.abs(y - fitted[of])
            scale = 6 * np.median(rest)
            u = rest / scale if scale > 0 else (rest > 0).astype(np.float64)
            robust = (1 - np.minimum(u, 1.0) ** 2) ** 2
    return Curve(at, heights)


def _anchors(knots: np.ndarray, x: np.ndarray, delta: float) -> np.ndarray:
    """Indices of the knots where a line is fitted: from each, the last one within delta, or the next."""
    if delta <= 0:
        return np.arange(len(knots))
    found, i, last = [0], 0, len(knots) - 1
    beyond = np.searchsorted(knots, knots + delta, side="right")
    while i < last:
        before_last = last if x[-2] == knots[last] else last - 1  # statsmodels fits the last two points in any case
        i = max(int(beyond[i]) - 1 if beyond[i] <= last else before_last, i + 1)
        found.append(i)
    return np.array(found)


def _line(z: np.ndarray, sums: np.ndarray, at: float, radius: float) -> float:
    """Height at `at` of the weighted line through points z, given each point's sums of 1, z, z^2, y and yz."""
    found = np.zeros(5)
    for i in range(0, len(z), _BLOCK):  # blocks that stay in the cache
        u = z[i : i + _BLOCK] - at
        if radius > 0:
            np.abs(u, out=u)
            u /= radius
            near = u * u
            near *= u
            np.subtract(1, near, out=near)
            np.multiply(near, near, out=u)
            near *= u
            np.maximum(near, 0, out=near)  # rounding at the rim
        else:
            near = (u == 0).astype(np.float64)
        found += near @ sums[i : i + _BLOCK]
    total, first, second, height, mixed = found
    if total <= 1e-12:
        return float("nan")
    middle = first / total
    spread = second / total - middle * middle
    slope = (mixed - middle * height) / total / spread if spread > 1e-14 else 0.0
    return float(height / total + (at - middle) * slope)
