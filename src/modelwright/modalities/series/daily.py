"""A table of any cadence as days: values are added up, temperatures averaged, gaps and odd days counted."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.data.tables import column, table
from modelwright.core.errors import UserError

_MISSING = {"", "na", "nan", "null", "none", "-", "n/a"}
_TRUE, _FALSE = {"true", "t", "yes", "y", "1"}, {"false", "f", "no", "n", "0"} | _MISSING
_ISO = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:[T ].*)?")
_COMPACT = re.compile(r"(\d{4})(\d{2})(\d{2})")
_OTHER = re.compile(r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})(?:[T ].*)?")
COMPLETE = 0.9  # a day with fewer rows than this share of the usual number is left out
HOTTEST = 50.0  # degrees Celsius; no inhabited place has a warmer daily mean


@dataclass(frozen=True)
class Days:
    """One row per group and day, in that order; `day` counts from 1970-01-01, a missing value is NaN."""

    day: np.ndarray  # (n,) int64
    value: np.ndarray  # (n,)
    temperature: np.ndarray | None = None  # (n,) degrees Celsius, mean of the day
    holiday: np.ndarray | None = None  # (n,) bool
    group: np.ndarray | None = None  # (n,) int, index into names
    names: tuple[str, ...] = ("",)
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.day)

    @property
    def groups(self) -> np.ndarray:
        return np.zeros(len(self), np.int64) if self.group is None else self.group

    @property
    def year(self) -> np.ndarray:
        return self.period("year")

    @property
    def weekday(self) -> np.ndarray:
        """0 is Monday."""
        return (self.day + 3) % 7

    @property
    def day_of_year(self) -> np.ndarray:
        """From 0."""
        return self.day - (self.day.astype("datetime64[D]").astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)

    def period(self, kind: str) -> np.ndarray:
        """A number per period: the year, or the quarters or months since 1970."""
        month = self.day.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
        return {"month": month, "quarter": month // 3, "year": month // 12 + 1970}[kind]

    def take(self, keep: np.ndarray) -> "Days":
        """The rows where `keep` is true."""
        temperature, holiday, group = (None if a is None else a[keep] for a in (self.temperature, self.holiday, self.group))
        return Days(self.day[keep], self.value[keep], temperature, holiday, group, self.names, self.facts)


def read(
    path: str, *, date: str, value: str, temperature: str = "", holiday: str = "", group: str = "", unit: str = "ask", combine: str = "sum"
) -> Days:
    """The days of a table. `combine` says whether a day's value is the sum or the mean of its rows.

    Raises UserError for dates that cannot be told apart, values that are no numbers, a temperature that is not in degrees
    Celsius and whose `unit` is not given, or a day whose rows disagree about being a holiday.
    """
    file = Path(path).expanduser()
    whole = table(file)
    day = parse_dates(column(file, whole, date), f"column '{date}'")
    n = len(day)
    words = [str(w) for w in column(file, whole, group)] if group else [""] * n
    names = tuple(sorted(set(words)))
    place = {name: i for i, name in enumerate(names)}
    code = np.fromiter((place[w] for w in words), np.int64, n)
    v = _numbers(column(file, whole, value), value)
    keys, first, where, rows = np.unique(np.stack([code, day]), axis=1, return_index=True, return_inverse=True, return_counts=True)
    where = where.reshape(-1)
    total, good = _sums(v, where, len(first))
    usual = rows.max() - np.bincount(rows)[::-1].argmax()  # the most frequent number of rows; of several, the largest
    if (most := int(rows.max())) > 1.5 * usual:
        why = f"other days have {usual}"
        raise UserError(
            f"{text(keys[1][rows.argmax()])} has {most} rows",
            why,
            "remove the double rows, or name the column that tells them apart with --group",
        )
    hollow = (good > 0) & (good < COMPLETE * usual)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(good > 0, total if combine == "sum" else total / good, np.nan)
    facts = {"rows": n, "rows per day": int(usual), "days": len(first)}
    facts |= {"rows without a value": int(np.isnan(v).sum()), "incomplete days left out": int(hollow.sum())}
    warm = None
    if temperature:
        t, seen = _sums(_numbers(column(file, whole, temperature), temperature), where, len(first))
        with np.errstate(invalid="ignore", divide="ignore"):
            warm = celsius(np.where(seen > 0, t / seen, np.nan), unit, temperature)
        warm, filled = _fill(warm, keys[0], keys[1], temperature)
        facts["days whose temperature was interpolated"] = filled
    free = None
    if holiday:
        marks = _flags(column(file, whole, holiday), holiday)
        on, _ = _sums(marks, where, len(first))
        if len(odd := np.flatnonzero((on > 0) & (on < rows))):
            raise UserError(f"{text(keys[1][odd[0]])} is a holiday in some rows and none in others", how=f"mend column '{holiday}'")
        free = on > 0
    days = Days(keys[1], values, warm, free, keys[0] if group else None, names, facts)
    return days.take(~hollow)


def parse_dates(values: Sequence[Any], where: str) -> np.ndarray:
    """Days since 1970-01-01 of dates: 2012-01-31, 20120131, 31/01/2012 or 01/31/2012, with or without a time of day."""
    words = [str(v).strip() for v in values]
    different = list(dict.fromkeys(words))
    swapped = _day_first([m for w in different if (m := _OTHER.fullmatch(w))], where)
    known: dict[str, int] = {}
    for w in different:
        if m := _ISO.fullmatch(w) or _COMPACT.fullmatch(w):
            parts = m.groups()
        elif m := _OTHER.fullmatch(w):
            a, b, year = m.groups()
            parts = (year, b, a) if swapped else (year, a, b)
        else:
            row = words.index(w) + 1
            raise UserError(f"row {row} of {where} is '{w}'", "it is no date that can be read", "write dates as 2012-01-31")
        try:
            known[w] = int(np.datetime64(f"{parts[0]}-{int(parts[1]):02d}-{int(parts[2]):02d}", "D").astype(np.int64))
        except ValueError:
            raise UserError(f"row {words.index(w) + 1} of {where} is '{w}'", "there is no such day", "mend it") from None
    return np.fromiter((known[w] for w in words), np.int64, len(words))


def _day_first(found: list[re.Match], where: str) -> bool:
    if not found:
        return False
    first, second = max(int(m[1]) for m in found), max(int(m[2]) for m in found)
    if (first > 12) == (second > 12):
        why = "no day above 12 tells the day from the month" if first <= 12 else "the day stands first in some rows and second in others"
        raise UserError(f"{where} has dates like '{found[0][0]}'", why, "write dates as 2012-01-31")
    return first > 12


def text(day: int | np.integer) -> str:
    """A day as 2012-01-31."""
    return str(np.datetime64(int(day), "D"))


def celsius(values: np.ndarray, unit: str, where: str) -> np.ndarray:
    """Daily means in degrees Celsius. `unit` 'ask' raises UserError where they cannot be degrees Celsius."""
    if unit == "fahrenheit":
        return (values - 32) / 1.8
    if unit == "kelvin":
        return values - 273.15
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if unit == "ask" and (high > HOTTEST or low < -90):
        guess = "kelvin" if low > 150 else "fahrenheit"
        raise UserError(
            f"'{where}' has daily means from {low:.1f} to {high:.1f}",
            "that is no range of degrees Celsius",
            f"say what it is, for example --unit {guess}, or --unit celsius where it is right",
        )
    return values


def _numbers(values: Sequence[Any], where: str) -> np.ndarray:
    out = np.empty(len(values))
    for i, v in enumerate(values):
        if v is None or (isinstance(v, str) and v.strip().lower() in _MISSING):
            out[i] = np.nan
            continue
        try:
            out[i] = float(v)
        except (TypeError, ValueError):
            raise UserError(f"row {i + 1} of '{where}' is {v!r}", "a number is needed", "mend it, or leave the cell empty") from None
        if math.isinf(out[i]):
            raise UserError(f"row {i + 1} of '{where}' is {v!r}", "a finite number is needed", "mend it, or leave the cell empty")
    if len(out) and np.isnan(out).all():
        raise UserError(f"column '{where}' is empty", "no row has a number in it", "choose another column")
    return out


def _flags(values: Sequence[Any], where: str) -> np.ndarray:
    out = np.zeros(len(values))
    for i, v in enumerate(values):
        word = "" if v is None else str(v).strip().lower()
        if word not in _TRUE and word not in _FALSE:
            raise UserError(f"row {i + 1} of '{where}' is {v!r}", "it must be true or false", "choose another column")
        out[i] = word in _TRUE
    return out


def _sums(values: np.ndarray, where: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the numbers of each day, and how many they are."""
    good = ~np.isnan(values)
    return np.bincount(where[good], values[good], n), np.bincount(where[good], minlength=n)


def _fill(values: np.ndarray, group: np.ndarray, day: np.ndarray, where: str) -> tuple[np.ndarray, int]:
    """Missing temperatures by a line between the neighbouring days of the group; UserError above a tenth."""
    holes = np.isnan(values)
    if holes.sum() > 0.1 * len(values):
        raise UserError(
            f"'{where}' is missing on {holes.sum()} of {len(values)} days", "at most a tenth can be interpolated", "fill it first"
        )
    out = values.copy()
    for g in np.unique(group[holes]):
        mine, good = (group == g) & holes, (group == g) & ~holes
        if not good.any():
            raise UserError(f"'{where}' is missing for a whole group", how="leave the group out")
        out[mine] = np.interp(day[mine], day[good], values[good])
    return out, int(holes.sum())
