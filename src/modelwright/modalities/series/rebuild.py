"""Hidden days rebuilt from their totals, beside two controls; and what the errors on years left out say about the rest."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modelwright.core.errors import UserError
from modelwright.modalities.series.daily import Days, text
from modelwright.modalities.series.totals import climatology, keys, label, ratios, spread, sums

LEVEL = 0.9  # of the intervals


class Shaper(Protocol):
    """What learns the daily shape: see modalities/backcast.py."""

    totals: str
    dropped: int

    def fit(self, days: Days) -> "Shaper": ...

    def shape(self, days: Days) -> tuple[np.ndarray, int]: ...


@dataclass
class Rebuilt:
    """Hidden days with their truth (NaN where unknown), the reconstruction and the controls."""

    days: Days
    found: np.ndarray
    flat: np.ndarray
    climatology: np.ndarray
    beyond: int  # days warmer or colder than any that was learnt from
    dropped: int  # days that could not be learnt from

    def mass_error(self, kind: str, total: np.ndarray | None = None) -> float:
        """Largest relative distance between a total and the sum of its days."""
        key = keys(self.days, kind)
        total = sums(self.days.value, key)[1] if total is None else total
        return float((np.abs(sums(self.found, key)[1] - total) / np.maximum(total, 1e-300)).max())

    def said(self) -> dict[str, int]:
        return {
            "days beyond the temperatures learnt from, set to the nearest": self.beyond,
            "days not learnt from: incomplete years, totals of zero or less": self.dropped,
        }


def rebuild(model: Shaper, seen: Days, hidden: Days, totals: np.ndarray | None = None) -> Rebuilt:
    """Reconstruct `hidden` from its totals (its own, unless given) after learning from `seen`."""
    key = keys(hidden, model.totals)
    total = sums(hidden.value, key)[1] if totals is None else totals
    shape, beyond = model.fit(seen).shape(hidden)
    ratio, good = ratios(seen.value, keys(seen, model.totals))
    cells = climatology(ratio[good], (seen.period("month") % 12)[good], seen.weekday[good])
    usual = cells[hidden.period("month") % 12, hidden.weekday]
    found, flat, seasonal = (spread(x, key, total) for x in (shape, np.ones(len(hidden)), usual))
    return Rebuilt(hidden, found, flat, seasonal, beyond, model.dropped)


def margins(model: Shaper, seen: Days) -> tuple[float, float]:
    """Factors that hold 90 % of the days of years left out, below and above their reconstruction.

    With one year to learn from, each month is left out instead, and the interval may be too narrow.
    """
    of = seen.year if len(set(seen.year.tolist())) > 1 else seen.period("month")
    rest = []
    for fold in np.unique(of):
        if (of != fold).sum() >= 28:
            one = rebuild(model, seen.take(of != fold), seen.take(of == fold))
            rest.append(one.days.value[one.found > 0] / one.found[one.found > 0])
    low, high = np.quantile(np.concatenate(rest), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if rest else (1.0, 1.0)
    return float(low), float(high)


def check_totals(days: Days, kind: str) -> None:
    """UserError where a period of days with values has a negative total."""
    found, total, _ = sums(days.value, keys(days, kind))
    if (total < 0).any():
        bad = int(found[np.flatnonzero(total < 0)[0]])
        where = f"{label(bad % 100_000 - 50_000, kind)} {days.names[bad // 100_000]}".strip()
        what = f"{int((total < 0).sum())} of {len(total)} {kind}s have a negative total, {where} first"
        raise UserError(what, "a day's share of a negative total means nothing", "leave those rows out, or add up what is positive")


def write(file: Path, results: list[Rebuilt], edges: list[tuple[float, float]]) -> None:
    """A csv of date, group, value, low and high (90 %), and the true value where it is known."""
    with open(file, "w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["date", "group", "value", "low", "high", "truth"])
        for one, (low, high) in zip(results, edges, strict=True):
            columns: list[Any] = [one.days.day, one.days.groups, one.found.tolist(), one.days.value.tolist()]
            for day, group, v, truth in zip(*columns, strict=True):
                rows.writerow([text(day), one.days.names[group], v, v * low, v * high, "" if np.isnan(truth) else truth])
