"""Totals of periods and the days in them: ratios to the period's mean, and a shape spread so that every total is exact."""

import numpy as np

from modelwright.core.errors import UserError
from modelwright.modalities.series.daily import Days

FLOOR = 1e-3  # of the period's mean day: no predicted day goes below it, so that no value turns negative


def keys(days: Days, kind: str) -> np.ndarray:
    """One number per group and period, rising with the group, then with time."""
    return days.groups * 100_000 + days.period(kind) + 50_000


def label(period: int, kind: str) -> str:
    """A period as 2012, 2012-Q1 or 2012-01."""
    if kind == "year":
        return str(period)
    parts, sign = (12, "-") if kind == "month" else (4, "-Q")
    return f"{period // parts + 1970}{sign}{period % parts + 1:0{2 if kind == 'month' else 1}d}"


def sums(values: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different keys, the total of each, and for each row the place of its key."""
    keys, where = np.unique(key, return_inverse=True)
    return keys, np.bincount(where, values), where


def ratios(values: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each day over the mean day of its period, and which rows have one: a period with a total of zero or less has none."""
    _, total, where = sums(values, key)
    mean = total[where] / np.bincount(where)[where]
    good = mean > 0
    return np.divide(values, mean, out=np.full(len(values), np.nan), where=good), good


def spread(shape: np.ndarray, key: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Days (n,) proportional to `shape` (n,) that add up to `total` (m,), one per different key in rising order.

    The last correction of rounding puts every sum within 1e-15 of its total. Raises UserError for a negative total: its
    days would be negative or of both signs, and the shape says nothing about which.
    """
    keys, where = np.unique(key, return_inverse=True)
    if len(total) != len(keys):
        raise UserError(f"{len(total)} totals for {len(keys)} periods", how="give one total per period")
    if (total < 0).any():
        bad = int(np.flatnonzero(total < 0)[0])
        raise UserError(f"total {bad + 1} is {total[bad]:.6g}", "a negative total has no daily shape", "leave the period out")
    shape = np.maximum(shape, FLOOR)
    days = shape / np.bincount(where, shape)[where] * total[where]
    found = np.bincount(where, days)
    return days * np.divide(total, found, out=np.ones(len(keys)), where=found > 0)[where]


def climatology(ratio: np.ndarray, month: np.ndarray, weekday: np.ndarray) -> np.ndarray:
    """Mean ratio (12, 7) of each month of the year and weekday; 1 where none was seen."""
    cell = month * 7 + weekday
    count = np.bincount(cell, minlength=84)
    return np.divide(np.bincount(cell, ratio, 84), count, out=np.ones(84), where=count > 0).reshape(12, 7)


def scores(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """R2, RMSE and MAE in the values' unit, and MAPE in percent over the days above zero."""
    rest = truth - found
    spread_of = float(((truth - truth.mean()) ** 2).sum())
    above = truth > 0
    return {
        "r2": 1 - float((rest**2).sum()) / spread_of if spread_of else 0.0,
        "rmse": float(np.sqrt((rest**2).mean())),
        "mae": float(np.abs(rest).mean()),
        "mape": 100 * float((np.abs(rest[above]) / truth[above]).mean()) if above.any() else 0.0,
    }
