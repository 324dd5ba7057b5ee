"""The temperature at which a daily series turns from falling to rising: heating below it, cooling above.

When to use it: daily emissions or demand and the daily temperature of the same place, for a year or more.

Paper: Reconstructing Global Daily CO2 Emissions via Machine Learning (arXiv 2407.20057). It finds 16.5 C for the world, and
14.9 to 18.7 C for nations; how it estimates them is not published. The estimator here is ours:

    y_d = a + b1 min(T_d - c, 0) + b2 max(T_d - c, 0) + weekday + holiday + e,     y = E / (mean of E over the year around d) - 1

- c by a profile search (series/hinge.py), the rest by least squares for each c. In statistics this is segmented regression, in
  energy work the base of the degree days.
- The sign test: only b1 < 0 < b2 is a critical temperature. Otherwise there is none, and the result says so. `both_signs` is the
  share of the resamples with these signs.
- The interval is the middle 95 % of resamples made of blocks of 28 days. Single days as resamples would give an interval that is
  too narrow, because a warm day follows a warm day.
- Beside it, with the same weekdays and holidays: no temperature at all, a line, a parabola and its vertex, and the lowest point
  of a locally weighted curve. A hinge that explains no more than the line is no evidence.
- Extreme days: those warmer (colder) than the 95th (5th) percentile of the base years, and what the degrees beyond it add, by the
  slope, in percent of a mean day. That is an attribution by the fitted line, not an experiment.

Of a series shorter than two years the level is not divided out; a trend then stays in it, and the result says so.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.numbers.curves import Curve, lowess
from modelwright.core.step import EvalResult, StepContext
from modelwright.modalities.series.daily import Days, read
from modelwright.modalities.series.hinge import Hinge, bootstrap, fit, grid, r2


@dataclass(frozen=True)
class Knobs:
    table: str = knob(help="csv, jsonl, json or parquet; rows of any cadence", path=True, argument=True)
    value: str = knob(help="column of emissions or demand; the rows of a day are added up")
    temperature: str = knob(help="column of temperatures, averaged over the day")
    date: str = knob("date", "column of dates")
    unit: Literal["ask", "celsius", "fahrenheit", "kelvin"] = knob("ask", "of the temperature; ask: stop where it cannot be celsius")
    holiday: str = knob("", "column that is true on public holidays")
    combine: Literal["sum", "mean"] = knob("sum", "a day is the sum or the mean of its rows")
    base_years: list[int] = knob([], "years whose 5th and 95th percentiles call a day extreme; empty: all")
    block: int = knob(28, "days per block of the bootstrap", low=1)
    draws: int = knob(1000, "resamples", low=100)


def detrend(days: Days) -> tuple[np.ndarray, bool]:
    """E over the mean of the 365 days around it, less 1, and whether there were two years for that; E over its mean otherwise.

    In the first and last half year the nearest whole window is taken.
    """
    e = days.value
    if len(e) < 730:
        return e / e.mean() - 1, False
    total = np.concatenate([[0.0], np.cumsum(e)])
    level = (total[365:] - total[:-365]) / 365
    return e / level[np.clip(np.arange(len(e)) - 182, 0, len(level) - 1)] - 1, True


def calendar(days: Days) -> np.ndarray:
    """The constant, six weekdays and the holiday as columns (n, 7 or 8)."""
    columns = [np.ones(len(days))] + [(days.weekday == w).astype(float) for w in range(1, 7)]
    if days.holiday is not None and days.holiday.any():
        columns.append(days.holiday.astype(float))
    return np.stack(columns, 1)


def rivals(t: np.ndarray, y: np.ndarray, z: np.ndarray, curve: Curve) -> dict[str, Any]:
    """What else could describe y over t beside the calendar: R2 of each, and where it is lowest."""
    line, _ = r2(y, np.column_stack([z, t]))
    parabola, b = r2(y, np.column_stack([z, t, t * t]))
    low, high = grid(t)[[0, -1]]
    inner = (curve.x >= low) & (curve.x <= high)
    lowest = float(curve.x[inner][curve.y[inner].argmin()])
    return {
        "none": {"r2": r2(y, z)[0]},
        "line": {"r2": line},
        "line_without_calendar": {"r2": r2(y, np.column_stack([np.ones(len(t)), t]))[0]},
        "parabola": {"r2": parabola, "lowest": float(-b[-2] / (2 * b[-1])) if b[-1] > 0 else None},
        "local": {"lowest": lowest, "at_an_end": bool(lowest in (curve.x[inner][0], curve.x[inner][-1]))},
        "hinge_without_calendar": {"r2": fit(t, y, np.ones((len(t), 1))).r2},
    }


def extremes(days: Days, h: Hinge, base: list[int]) -> list[dict[str, Any]]:
    """For each year: days beyond the base years' 5th and 95th percentile, and what their degrees beyond add, % of a mean day."""
    t = days.temperature
    assert t is not None
    of = np.isin(days.year, base) if base else np.ones(len(days), bool)
    cold, hot = np.quantile(t[of], [0.05, 0.95])
    extra = 100 * (h.above * np.maximum(t - hot, 0) - h.below * np.maximum(cold - t, 0))
    rows = []
    for y in np.unique(days.year):
        mine = days.year == y
        counts = {"hot": int((t[mine] > hot).sum()), "cold": int((t[mine] < cold).sum())}
        rows.append({"year": int(y), "days": int(mine.sum()), **counts, "extra": float(extra[mine].sum())})
    return rows


def critical_temperature(knobs: Knobs, job: StepContext) -> EvalResult:
    """Fit, test, and compare."""
    names = {name: getattr(knobs, name) for name in ("date", "value", "temperature", "holiday", "unit", "combine")}
    days = read(knobs.table, **names)
    days = days.take(~np.isnan(days.value))
    _check(days, knobs)
    t, z = np.asarray(days.temperature), calendar(days)
    y, detrended = detrend(days)
    h = fit(t, y, z)
    with job.progress.task("bootstrap"):
        draws = bootstrap(t, y, z, draws=knobs.draws, block=knobs.block, seed=job.seed)
    _, g = r2(y, np.column_stack([z, np.minimum(t - h.c, 0), np.maximum(t - h.c, 0)]))
    rest = y - z @ g[:-2] + g[0]
    curve = lowess(t, rest, frac=0.3, delta=0.005 * float(np.ptp(t)))
    others = rivals(t, y, z, curve)
    metrics = _metrics(h, draws, others) | {"detrended": detrended, "days": len(days)}
    if h.is_v:
        metrics["extreme_days"] = extremes(days, h, knobs.base_years)
    return _finding(knobs, metrics, h, curve, days.facts)


def _check(days: Days, knobs: Knobs) -> None:
    if len(days.day) < max(90, 3 * knobs.block):
        raise UserError(
            f"{len(days)} days have a value", f"{max(90, 3 * knobs.block)} are the least for blocks of {knobs.block}", "give more"
        )
    if days.value.mean() <= 0:
        raise UserError(f"the mean of '{knobs.value}' is {days.value.mean():.4g}", "it must be positive to be compared with")
    if np.ptp(np.asarray(days.temperature)) == 0:
        raise UserError("all temperatures are equal", how="choose another column")
    if absent := set(knobs.base_years) - set(days.year.tolist()):
        raise UserError(f"there are no days of {min(absent)}", "it is named in base_years", "choose years of the table")


def _metrics(h: Hinge, draws: np.ndarray, others: dict[str, Any]) -> dict[str, Any]:
    both = float(((draws[:, 1] < 0) & (draws[:, 2] > 0)).mean())
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {
        "tc": h.c if h.is_v else None,
        "interval": [float(low[0]), float(high[0])] if h.is_v else None,
        "below": 100 * h.below,
        "above": 100 * h.above,
        "below_interval": [100 * float(low[1]), 100 * float(high[1])],
        "above_interval": [100 * float(low[2]), 100 * float(high[2])],
        "both_signs": both,
        "r2": h.r2,
        "gain_over_line": h.r2 - others["line"]["r2"],
        "others": others,
    }


def _finding(knobs: Knobs, m: dict[str, Any], h: Hinge, curve: Curve, facts: dict[str, Any]) -> EvalResult:
    if h.is_v:
        low, high = m["interval"]
        words = (
            f"{knobs.value} is lowest at {h.c:.1f} C ({low:.1f} to {high:.1f}); it falls by {-100 * h.below:.2f} % a degree below and "
            f"rises by {100 * h.above:.2f} % above. R2 {h.r2:.3f}, a line {m['others']['line']['r2']:.3f}."
        )
        tile = (f"{h.c:.1f} C", "critical temperature", f"95 % of resamples {low:.1f} to {high:.1f}")
    else:
        words = (
            f"There is no critical temperature: the slopes are {100 * h.below:.2f} and {100 * h.above:.2f} % a degree on the two sides "
            f"of the best break, and only a fall followed by a rise is one."
        )
        tile = ("none", "critical temperature", "the slopes have the wrong signs")
    if not m["detrended"]:
        words += " The series is shorter than two years, so its trend is still in it."
    rows = [["hinge", f"{h.r2:.3f}", f"{h.c:.2f}"]]
    for name, o in m["others"].items():
        at = o.get("lowest")
        rows.append([name.replace("_", " "), f"{o['r2']:.3f}" if "r2" in o else "", "" if at is None else f"{at:.2f}"])
    tables = [{"title": "The hinge and others", "columns": ["shape", "R2", "lowest at, C"], "rows": rows}]
    if "extreme_days" in m:
        found = [[e["year"], e["days"], e["hot"], e["cold"], f"{e['extra']:.1f}"] for e in m["extreme_days"]]
        columns = ["year", "days", "hot", "cold", "they add, % of a mean day"]
        tables.append({"title": "Extreme days", "columns": columns, "rows": found})
    at = np.linspace(curve.x[0], curve.x[-1], 60)
    bent = h.below * np.minimum(at - h.c, 0) + h.above * np.maximum(at - h.c, 0)
    local = curve(at)
    series = {"hinge": bent + local.mean() - bent.mean(), "locally weighted": local}
    plot = {
        "kind": "line",
        "title": f"{knobs.value} over temperature, weekdays and holidays taken out",
        "x": "temperature, C",
        "y": "% of a mean day",
        "series": {k: [[float(a), 100 * float(b)] for a, b in zip(at, v, strict=True)] for k, v in series.items()},
    }
    return EvalResult(m, words, [tile], tables, [plot], facts)


METHOD = critical_temperature
