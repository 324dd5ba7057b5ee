"""Daily values of a past of which only monthly, quarterly or yearly totals are known, from temperature and the calendar.

When to use it: a daily series (emissions, demand, sales) exists for some recent years, the years before have only totals, and
daily temperatures reach back. It also says how well that works: it hides a year, gives back its totals alone, and compares.

Paper: Reconstructing Global Daily CO2 Emissions via Machine Learning (arXiv 2407.20057).

    r_d = E_d / mean of E over the year of d          the response; levels that drift over decades cancel
    r_hat = f(temperature, its lags, weekday, season, holidays, group)
    E_hat_d = r_hat_d / (sum of r_hat over the period) * total of the period        every total is met exactly

The paper: monthly ratios of national emissions, XGBoost, EDGAR's monthly totals, folds over years. There is no official code, and
its list of predictors could not be read; the list above is ours.

Ours: the ratio to the year's mean also where monthly totals are given (`response`; the paper's is `period`): a warm month then
shows in the response, and it was better on each year of the Victorian demand left out. Any regressor of scikit-learn (`learner`,
or module:Class of another package); the default is boosting with small trees, 300 of 7 leaves at a rate of .05, chosen on the
same series. Quarters and years beside months, folds by whole years only (a day is like its neighbours, so random folds flatter),
and an interval from the errors on years left out. Trees know no temperature outside those they saw: warmer and colder days are set to the
nearest temperature seen, counted and named. Two controls stand beside every result: the flat period, and the mean of each month
and weekday (climatology), both with the same exact totals.

Limits: the working week is taken as it is in the years that are learnt from (Saturdays were worked before); a period whose total
is zero or less is left out of learning and has no daily shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.data.tables import column, numbers, table
from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.modalities.series.daily import Days, read
from modelwright.modalities.series.learner import DEFAULT, regressor
from modelwright.modalities.series.rebuild import LEVEL, Rebuilt, check_totals, margins, rebuild, write
from modelwright.modalities.series.totals import keys, label, ratios, scores, spread


@dataclass(frozen=True)
class Knobs:
    table: str = knob(help="csv, jsonl, json or parquet; rows of any cadence", path=True, argument=True)
    value: str = knob(help="column to reconstruct; the rows of a day are added up")
    date: str = knob("date", "column of dates")
    temperature: str = knob("", "column of temperatures, averaged over the day; empty: calendar alone")
    unit: Literal["ask", "celsius", "fahrenheit", "kelvin"] = knob("ask", "of the temperature; ask: stop where it cannot be celsius")
    holiday: str = knob("", "column that is true on public holidays")
    group: str = knob("", "column of countries or regions, each with its own totals")
    totals: Literal["month", "quarter", "year"] = knob("month", "periods whose totals are known")
    hide: list[int] = knob([], "years whose days are hidden and reconstructed from their totals; empty: each year in turn")
    response: Literal["year", "period"] = knob("year", "learn ratios to the mean of the year, or of the period")
    known: str = knob(
        "", "table of totals for days that have no value, with columns period (2012, 2012-Q1 or 2012-01), total and group", path=True
    )
    combine: Literal["sum", "mean"] = knob("sum", "a day is the sum or the mean of its rows")
    learner: str = knob("HistGradientBoostingRegressor", "regressor of scikit-learn by name, or module:Class")
    settings: dict[str, Any] = knob({}, "settings of the learner")


class Backcaster:
    """Learns the daily shape of days with values, and spreads totals over days without. `learner` makes a fresh regressor."""

    def __init__(self, learner: Callable[[], Any] | None = None, totals: str = "month", response: str = "year"):
        self.learner = learner or regressor(DEFAULT, {})
        self.totals, self.response = totals, response

    def fit(self, days: Days) -> "Backcaster":
        """Learn from days (n,). Left out and counted in `dropped`: days of years (or periods) with a total of zero or less, and
        of incomplete years, unless there is no complete one; then ratios to the period's mean are learnt."""
        days = days.take(~np.isnan(days.value))
        whole = _whole_years(days)
        by_year = self.response == "year" and bool(whole.any())
        ratio, good = ratios(days.value, keys(days, "year" if by_year else self.totals))
        good &= whole | (not by_year)
        self.dropped = int((~good).sum())
        if good.sum() < 28:
            raise UserError(f"{int(good.sum())} days can be learnt from", "four weeks are the least", "give more days with positive totals")
        days, ratio = days.take(good), ratio[good]
        self.groups = days.names
        self.range = None if days.temperature is None else (float(days.temperature.min()), float(days.temperature.max()))
        self.model = self.learner().fit(self._features(days)[0], ratio)
        return self

    def shape(self, days: Days) -> tuple[np.ndarray, int]:
        """Predicted ratios (n,), and how many days were warmer or colder than any that was learnt from."""
        features, beyond = self._features(days)
        return np.asarray(self.model.predict(features), np.float64), beyond

    def predict(self, days: Days, total: np.ndarray) -> np.ndarray:
        """Values (n,) that add up to `total` (m,), one for each group and period of `days` in rising order."""
        return spread(self.shape(days)[0], keys(days, self.totals), total)

    def _features(self, days: Days) -> tuple[np.ndarray, int]:
        season = 2 * np.pi * days.day_of_year / 365.25
        columns = [np.sin(season), np.cos(season), np.sin(2 * season), np.cos(2 * season), days.day_of_year.astype(float)]
        columns += [(days.weekday == w).astype(float) for w in range(7)]
        if len(days.names) > 1:
            columns.append(days.groups.astype(float))
        if days.holiday is not None:
            free = days.holiday.astype(float)
            columns += [free, _lag(free, days, 1), _lag(free, days, -1)]
        beyond = 0
        if self.range is not None:
            if days.temperature is None:
                raise UserError("these days have no temperature", "the shape was learnt with one", "give a temperature for each day")
            t = np.clip(days.temperature, *self.range)
            beyond = int((t != days.temperature).sum())
            columns += [t, *(_lag(t, days, k) for k in (1, 2)), np.mean([_lag(t, days, k) for k in range(7)], axis=0)]
        return np.stack(columns, 1), beyond


def _whole_years(days: Days) -> np.ndarray:
    """Which days belong to a year, of their group, that is there but for ten days."""
    _, where, count = np.unique(keys(days, "year"), return_inverse=True, return_counts=True)
    return (count >= 355)[where]


def _lag(x: np.ndarray, days: Days, k: int) -> np.ndarray:
    """x of k days ago in the same group, where that day is there; else of the day itself."""
    at = days.groups * 10_000_000 + days.day
    place = np.minimum(np.searchsorted(at, at - k), len(at) - 1)
    return np.where(at[place] == at - k, x[place], x)


def backcast(knobs: Knobs, job: StepContext) -> EvalResult:
    """Hide years and rebuild them; or, with `known`, give days to totals that had none. Writes days.csv."""
    model = Backcaster(regressor(knobs.learner, knobs.settings), knobs.totals, knobs.response)
    columns = {name: getattr(knobs, name) for name in ("date", "value", "temperature", "holiday", "group", "unit", "combine")}
    days = read(knobs.table, **columns)
    seen = days.take(~np.isnan(days.value))
    check_totals(seen, knobs.totals)
    if knobs.known:
        return _from_known_totals(knobs, job, days, seen, model)
    folds = _folds(knobs.hide, sorted(set(seen.year.tolist())))
    results, edges = [], []
    with job.progress.task("leave years out", len(folds)) as tick:
        for fold in folds:
            hidden = np.isin(seen.year, fold)
            edges.append(margins(model, seen.take(~hidden)))
            results.append(rebuild(model, seen.take(~hidden), seen.take(hidden)))
            tick(1)
    write(job.folder / "days.csv", results, edges)
    return _finding(knobs, folds, results, edges, days.facts)


def _folds(hide: list[int], years: list[int]) -> list[list[int]]:
    if absent := set(hide) - set(years):
        raise UserError(f"there are no days of {min(absent)} to hide", f"the table holds {years[0]} to {years[-1]}", "choose one of these")
    folds = [hide] if hide else [[y] for y in years]
    if len(years) <= len(folds[0]):
        raise UserError(f"all of {', '.join(map(str, years))} would be hidden", "a year is needed to learn from", "give more years")
    return folds


def _from_known_totals(knobs: Knobs, job: StepContext, days: Days, seen: Days, model: Backcaster) -> EvalResult:
    """Days for the periods of a table of totals."""
    given = _known(knobs.known, days)
    names = [(days.names[g], label(int(p), knobs.totals)) for g, p in zip(days.groups, days.period(knobs.totals), strict=True)]
    blank = np.isnan(days.value) & np.array([n in given for n in names], bool)
    if not blank.any():
        why = f"{int(np.isnan(days.value).sum())} days have none, and {names[0][1]} is how a period must be written"
        raise UserError(f"no day without a value lies in a period of {knobs.known}", why, "add rows with a date and no value")
    hidden = days.take(blank)
    wanted = list(dict.fromkeys(n for n, b in zip(names, blank, strict=True) if b))
    total = np.array([given[n] for n in wanted])
    one, (low, high) = rebuild(model, seen, hidden, total), margins(model, seen)
    write(job.folder / "days.csv", [one], [(low, high)])
    facts = days.facts | {"totals used": len(wanted), "totals without days": len(given) - len(wanted)} | one.said()
    metrics = {
        "days": len(hidden),
        "periods": len(wanted),
        "mass_error": one.mass_error(knobs.totals, total),
        "interval": {"level": LEVEL, "low": low, "high": high},
        "beyond_training_temperatures": one.beyond,
    }
    words = f"{len(hidden)} days from {len(wanted)} totals; 90 % of days left out are {low:.2f} to {high:.2f} times what was found."
    return EvalResult(metrics, words, [(str(len(hidden)), "days reconstructed", f"from {len(wanted)} totals")], facts=facts)


def _known(path: str, days: Days) -> dict[tuple[str, str], float]:
    """Totals by group and period."""
    file = Path(path)
    whole = table(file)
    period = [str(p) for p in column(file, whole, "period")]
    total = numbers(column(file, whole, "total"), f"'total' of {file}")
    group = [str(g) for g in column(file, whole, "group")] if len(days.names) > 1 else [days.names[0]] * len(period)
    given = dict(zip(zip(group, period, strict=True), total.tolist(), strict=True))
    if len(given) < len(period):
        raise UserError(f"{file} has two totals for one period", how="keep one")
    return given


WAYS = {"learned": "found", "flat": "flat", "climatology": "climatology"}


def _metrics(folds: list[list[int]], results: list[Rebuilt], edges: list[tuple[float, float]], kind: str) -> dict[str, Any]:
    years: dict[str, Any] = {}
    for fold, one, (low, high) in zip(folds, results, edges, strict=True):
        inside = (one.days.value >= low * one.found) & (one.days.value <= high * one.found)
        found = {way: scores(one.days.value, getattr(one, name)) for way, name in WAYS.items()}
        years["+".join(map(str, fold))] = found | {"coverage": float(inside.mean())}
    truth = np.concatenate([one.days.value for one in results])
    whole = {way: scores(truth, np.concatenate([getattr(one, name) for one in results])) for way, name in WAYS.items()}
    coverage = float(np.average([y["coverage"] for y in years.values()], weights=[len(one.days) for one in results]))
    return whole["learned"] | {
        "flat": whole["flat"],
        "climatology": whole["climatology"],
        "years": years,
        "interval": {"level": LEVEL, "coverage": coverage},
        "mass_error": max(one.mass_error(kind) for one in results),
        "beyond_training_temperatures": sum(one.beyond for one in results),
    }


def _finding(
    knobs: Knobs, folds: list[list[int]], results: list[Rebuilt], edges: list[tuple[float, float]], facts: dict[str, Any]
) -> EvalResult:
    m = _metrics(folds, results, edges, knobs.totals)
    facts = facts | {k: sum(one.said()[k] for one in results) for k in results[0].said()}
    rows = [[y, w, f"{s[w]['r2']:.3f}", f"{s[w]['mape']:.2f} %", f"{s[w]['rmse']:.4g}"] for y, s in m["years"].items() for w in WAYS]
    lines = {"truth": results[0].days.value, "reconstructed": results[0].found, "month and weekday": results[0].climatology}
    plot = {
        "kind": "line",
        "title": f"The first days of {'+'.join(map(str, folds[0]))}",
        "x": "day",
        "y": knobs.value,
        "series": {k: [[i, float(v)] for i, v in enumerate(x[:120])] for k, x in lines.items()},
    }
    flat, usual = m["flat"]["r2"], m["climatology"]["r2"]
    words = (
        f"From {knobs.totals}ly totals alone, {m['r2']:.3f} of the variance of the hidden days comes back (flat {flat:.3f}, month and "
        f"weekday {usual:.3f}); {100 * m['interval']['coverage']:.0f} % of them lie in the 90 % interval."
    )
    tile = (f"{m['r2']:.3f}", "R2 on hidden days", f"flat {flat:.2f}, month and weekday {usual:.2f}")
    table_ = {"title": "Hidden years", "columns": ["year", "shape", "R2", "MAPE", "RMSE"], "rows": rows}
    return EvalResult(m, words, [tile], [table_], [plot], facts)


METHOD = backcast
