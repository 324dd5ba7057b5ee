"""Fitted biases: what is subtracted along a feature, and how it lies on disk. A curve (core/numbers/curves.py) or a window."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modelwright.core.numbers.curves import Curve


@dataclass(frozen=True)
class Window:
    """Mean of the pooled scores whose feature lies within `width` of a point; different features x (m,) rising."""

    x: np.ndarray
    count: np.ndarray  # (m,) scores at x
    total: np.ndarray  # (m,) their sum
    width: float

    def __call__(self, q: np.ndarray, short_by_one: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Means at q (NaN for an empty window), and how many scores each window holds."""
        low = np.searchsorted(self.x, q - self.width, side="left")
        high = np.searchsorted(self.x, q + self.width, side="right")
        middle = self.total.sum() / self.count.sum()  # small sums stay exact
        totals = np.r_[0.0, np.cumsum(self.total - middle * self.count)]
        counts = np.r_[0, np.cumsum(self.count)]
        total, count = totals[high] - totals[low], counts[high] - counts[low]
        if short_by_one:
            top = np.maximum(high - 1, 0)
            total, count = total - (self.total[top] / self.count[top] - middle), count - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count > 0, total / count, np.nan) + middle, count


Bias = Curve | Window | None  # None: a constant per unit of the feature


def mean_difference(c: np.ndarray, group: np.ndarray | None = None) -> float:
    """Mean |c_i - c_j| over all pairs within a group; over all pairs where group is None."""
    group = np.zeros(len(c), np.int64) if group is None else np.unique(group, return_inverse=True)[1]
    order = np.lexsort((c, group))
    size = np.bincount(group)
    place = np.arange(len(c)) - np.repeat(np.cumsum(size) - size, size)  # in its group, by rising c
    n = float((size * (size - 1) / 2).sum())
    return float(((2 * place - np.repeat(size, size) + 1) * c[order]).sum() / n) if n else 0.0


def to_plain(bias: Bias) -> dict[str, Any] | None:
    """A bias as plain values, for json."""
    if bias is None:
        return None
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(bias).items()}


def from_plain(method: str, plain: Any) -> Bias:
    """A bias as `to_plain` gives it. Raises ValueError for anything else, so that no other file is applied by mistake."""
    if method == "penalty":
        if plain is not None:
            raise ValueError("a penalty has no curve")
        return None
    names = {"lwr": {"x", "y"}, "mean": {"x", "count", "total", "width"}}[method]
    if not isinstance(plain, dict) or set(plain) != names:
        raise ValueError(f"a bias by {method} holds {', '.join(sorted(names))}")
    x = _column(plain["x"], "x")
    if not len(x) or not (np.diff(x) > 0).all():
        raise ValueError("x does not rise")
    if method == "lwr":
        return Curve(x, _column(plain["y"], "y", len(x)))
    count, total, width = _column(plain["count"], "count", len(x)), _column(plain["total"], "total", len(x)), plain["width"]
    if (count < 1).any() or (count != np.floor(count)).any():
        raise ValueError("count holds something that is no count")
    if not is_number(width) or width < 0:
        raise ValueError("width is no width")
    return Window(x, count.astype(np.int64), total, float(width))


def _column(values: Any, name: str, n: int | None = None) -> np.ndarray:
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ValueError(f"{name} is no list of finite numbers")
    if n is not None and len(values) != n:
        raise ValueError(f"{name} holds {len(values)} numbers for {n} of x")
    return np.asarray(values, np.float64)


def is_number(value: Any) -> bool:
    """Whether a value from a json file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
