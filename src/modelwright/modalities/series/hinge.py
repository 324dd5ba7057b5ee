"""A continuous hinge of y over x beside other columns: the breakpoint by profile search, its interval by moving blocks.

    y = a + b1 min(x - c, 0) + b2 max(x - c, 0) + Z g + e

For each c the rest is least squares. c is searched over GRID quantiles of x from 5 to 95 %, then refined by golden section
between the neighbours of the best. The bootstrap (Kunsch 1989) resamples blocks of consecutive rows, since days are not
independent. All resamples are solved at once from weighted sums of products: a resample is a vector of counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GRID = 181
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Hinge:
    """Breakpoint c, slopes below and above it, and the share of the variance that the whole equation explains."""

    c: float
    below: float
    above: float
    r2: float

    @property
    def is_v(self) -> bool:
        """Falling below the breakpoint and rising above it."""
        return self.below < 0 < self.above


def arms(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """min(x - c, 0) and max(x - c, 0) for each c: (n, len(c), 2)."""
    rest = x[:, None] - np.atleast_1d(c)
    return np.stack([np.minimum(rest, 0), np.maximum(rest, 0)], -1)


def grid(x: np.ndarray) -> np.ndarray:
    """Different quantiles of x from 5 to 95 %, rising."""
    return np.unique(np.quantile(x, np.linspace(0.05, 0.95, GRID)))


def _profile(x: np.ndarray, y: np.ndarray, q: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual sum of squares (m,) and slopes (m, 2) for each c; y is residual to q already."""
    a = arms(x, c)
    flat = a.reshape(len(x), -1)
    a = (flat - q @ (q.T @ flat)).reshape(a.shape)
    slopes, fitted = _solve2(np.einsum("nmi,nmj->mij", a, a), np.einsum("nmi,n->mi", a, y))
    return y @ y - fitted, slopes


def _solve2(squares: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solutions (..., 2) of many symmetric 2 x 2 systems, and right . solution; 0 where one is singular."""
    a, b, d = squares[..., 0, 0], squares[..., 0, 1], squares[..., 1, 1]
    det = a * d - b * b
    good = det > 1e-12 * a * d
    det = np.where(good, det, 1.0)
    first = np.where(good, (d * right[..., 0] - b * right[..., 1]) / det, 0.0)
    second = np.where(good, (a * right[..., 1] - b * right[..., 0]) / det, 0.0)
    return np.stack([first, second], -1), first * right[..., 0] + second * right[..., 1]


def fit(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> Hinge:
    """The hinge of y (n,) over x (n,) beside the columns z (n, k), which hold the constant."""
    q, _ = np.linalg.qr(z)
    rest = y - q @ (q.T @ y)
    at = grid(x)
    rss, _ = _profile(x, rest, q, at)
    best = int(rss.argmin())
    low, high = at[max(best - 1, 0)], at[min(best + 1, len(at) - 1)]
    c = _golden(lambda v: float(_profile(x, rest, q, np.array([v]))[0][0]), low, high, at[best])
    left, slopes = _profile(x, rest, q, np.array([c]))
    total = float(((y - y.mean()) ** 2).sum())
    return Hinge(float(c), float(slopes[0, 0]), float(slopes[0, 1]), 1 - float(left[0]) / total if total else 0.0)


def _golden(f: Callable[[float], float], low: float, high: float, start: float) -> float:
    """A minimum of f between low and high; `start` where that is lower."""
    first = f(start)
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    fa, fb = f(a), f(b)
    while high - low > 1e-9 * max(1.0, abs(high)):
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - _GOLDEN * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + _GOLDEN * (high - low)
            fb = f(b)
    middle = (low + high) / 2
    return middle if f(middle) <= first else start


def r2(y: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of the variance of y that least squares on the columns z (n, k) explains, and the coefficients (k,)."""
    found, *_ = np.linalg.lstsq(z, y, rcond=None)
    total = float(((y - y.mean()) ** 2).sum())
    return (1 - float(((y - z @ found) ** 2).sum()) / total if total else 0.0), found


def bootstrap(x: np.ndarray, y: np.ndarray, z: np.ndarray, *, draws: int, block: int, seed: int) -> np.ndarray:
    """Breakpoint and both slopes (draws, 3) of resamples made of blocks of `block` consecutive rows; c on the grid."""
    n, k, at = len(x), z.shape[1], grid(x)
    a = arms(x, at).reshape(n, -1)  # (n, 2m)
    z = z / np.linalg.norm(z, axis=0)
    pairs = a.reshape(n, -1, 2)
    products = np.concatenate(
        [
            np.einsum("ni,nj->nij", z, z).reshape(n, -1),
            np.einsum("ni,nj->nij", z, np.concatenate([a, y[:, None]], 1)).reshape(n, -1),
            np.stack([pairs[..., 0] ** 2, pairs[..., 0] * pairs[..., 1], pairs[..., 1] ** 2], -1).reshape(n, -1),
            a * y[:, None],
        ],
        1,
    )
    rng, found = np.random.default_rng(seed), []
    for begin in range(0, draws, 100):
        counts = np.stack([_counts(n, block, rng) for _ in range(min(100, draws - begin))])
        found.append(_from_sums(counts @ products, k, at))
    return np.concatenate(found)


def _counts(n: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n rows is drawn, in blocks that start anywhere; cut to n rows in all."""
    starts = rng.integers(0, n - block + 1, -(-n // block))
    return np.bincount((starts[:, None] + np.arange(block)).reshape(-1)[:n], minlength=n).astype(np.float64)


def _from_sums(s: np.ndarray, k: int, at: np.ndarray) -> np.ndarray:
    """Best breakpoint and slopes of each resample from its sums of products."""
    d, m = len(s), len(at)
    zz, zay, aa, ay = np.split(s, np.cumsum([k * k, k * (2 * m + 1), 3 * m]), axis=1)
    zz = zz.reshape(d, k, k) + 1e-10 * np.eye(k)  # a resample may hold no holiday
    zay = zay.reshape(d, k, 2 * m + 1)
    solved = np.linalg.solve(zz, zay)
    za, zy = zay[..., :-1].reshape(d, k, m, 2), zay[..., -1]
    sa = solved[..., :-1].reshape(d, k, m, 2)
    squares = np.stack([aa.reshape(d, m, 3)[..., [0, 1]], aa.reshape(d, m, 3)[..., [1, 2]]], -2)
    squares = squares - np.einsum("dkmi,dkmj->dmij", za, sa)
    right = ay.reshape(d, m, 2) - np.einsum("dkmi,dk->dmi", sa, zy)
    slopes, gain = _solve2(squares, right)
    best = gain.argmax(1)
    return np.concatenate([at[best][:, None], slopes[np.arange(d), best]], 1)
