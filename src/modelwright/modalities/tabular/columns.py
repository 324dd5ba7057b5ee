"""The columns of a table, and how a value is spelled as symbols that are read back without loss.

A field spells a value as a tuple of symbols, reads it back, and says which symbols may follow a beginning. That last part is the
grammar: a decoder that is held to it writes valid values only. DONE among the options says that the value may end there.

    Category    one symbol a value; in the text form the tokens of the word
    Padded      whole numbers and decimals of few digits, dates: v * 10^d - minimum, all digits, each with its place; never out of range
    Free        any other number, as Python writes it: 1e-07 is 1 e - 0 7
"""

import csv
import math
import re
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from modelwright.core.data.tables import column, is_number, table
from modelwright.core.errors import UserError, shown

Columns = dict[str, list[Any]]
DONE, MISSING = "", "<missing>"
GAPS = ("", "NA", "NaN", "nan", "null")
_START = datetime(1970, 1, 1)


@dataclass(frozen=True)
class Category:
    """Values of a closed list. `spelled` gives the symbols of each."""

    name: str
    values: tuple[Any, ...]
    spelled: tuple[tuple[str, ...], ...]
    gaps: bool = False

    @cached_property
    def _symbols(self) -> dict[Any, tuple[str, ...]]:
        return {(type(v), v): s for v, s in zip(self.values, self.spelled, strict=True)}

    @cached_property
    def _values(self) -> dict[tuple[str, ...], Any]:
        return dict(zip(self.spelled, self.values, strict=True))

    @cached_property
    def _follow(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        found: dict[tuple[str, ...], dict[str, None]] = {}
        for s in self.spelled:
            for n in range(len(s) + 1):
                found.setdefault(s[:n], {})[s[n] if n < len(s) else DONE] = None
        return {begun: tuple(after) for begun, after in found.items()}

    def spell(self, value: Any) -> tuple[str, ...]:
        if (type(value), value) not in self._symbols:
            raise UserError(f"{self.name}={shown(value)} was never seen", f"{len(self.values)} values are known", "leave the row out")
        return self._symbols[type(value), value]

    def read(self, symbols: tuple[str, ...]) -> Any:
        return self._values[symbols]

    def options(self, begun: tuple[str, ...]) -> tuple[str, ...]:
        return self._follow[begun]


@dataclass(frozen=True)
class Padded:
    """Whole numbers from `low` to `high` in units of 10^-decimals; `form` says what they stand for."""

    name: str
    low: int
    high: int
    decimals: int = 0
    form: str = "integer"  # integer | decimal | date | moment | moment T
    gaps: bool = False

    @property
    def width(self) -> int:
        return len(str(self.high - self.low))

    def spell(self, value: Any) -> tuple[str, ...]:
        try:
            number = _counted(value, self.form, self.decimals)
        except (ValueError, TypeError, ArithmeticError):
            number = None
        if number is None or not self.low <= number <= self.high:
            ends = f"{shown(self._value(self.low))} to {shown(self._value(self.high))}"
            raise UserError(f"{self.name}={shown(value)} cannot be written", f"the table that was learnt has {ends}", "leave it out")
        return tuple(f"{d}@{self.width - i}" for i, d in enumerate(str(number - self.low).zfill(self.width)))

    def read(self, symbols: tuple[str, ...]) -> Any:
        return self._value(self.low + int("".join(s[0] for s in symbols)))

    def _value(self, number: int) -> Any:
        if self.form == "integer":
            return number
        if self.form == "decimal":
            return float(Decimal(number).scaleb(-self.decimals))
        if self.form == "date":
            return date.fromordinal(number).isoformat()
        return (_START + timedelta(seconds=number)).isoformat("T" if self.form.endswith("T") else " ")

    def options(self, begun: tuple[str, ...]) -> tuple[str, ...]:
        rest = self.width - len(begun)
        if not rest:
            return (DONE,)
        first = int("".join(s[0] for s in begun) or "0") * 10
        return tuple(f"{d}@{rest}" for d in range(10) if (first + d) * 10 ** (rest - 1) <= self.high - self.low)


@dataclass(frozen=True)
class Free:
    """Numbers in the form that Python writes them, with as many digits as were seen."""

    name: str
    whole: int  # digits before the point, at most
    part: int  # digits after it, at most; 0: whole numbers
    negative: bool
    exponents: tuple[str, ...] = ()
    gaps: bool = False

    def spell(self, value: Any) -> tuple[str, ...]:
        text = repr(float(value) if self.part else value)
        for i in range(len(text) + 1):
            after = text[i : i + 1]
            if after not in self.options(tuple(text[:i])):
                raise UserError(f"{self.name}={shown(value)} cannot be written", "no number of its form was seen", "leave it out")
        return tuple(text)

    def read(self, symbols: tuple[str, ...]) -> Any:
        return (float if self.part else int)("".join(symbols))

    def options(self, begun: tuple[str, ...]) -> tuple[str, ...]:
        text = "".join(begun)
        mantissa, mark, power = text.partition("e")
        if mark:
            n = len(power) + 1
            return tuple(dict.fromkeys(e[n : n + 1] for e in self.exponents if e[:n] == "e" + power))
        whole, point, part = mantissa.lstrip("-").partition(".")
        found: list[str] = []
        if not point:
            if whole != "0" and len(whole) < self.whole:
                found += "0123456789"
            if whole and self.part:
                found.append(".")
        elif len(part) < self.part:
            found += "0123456789"
        if not text and self.negative:
            found.append("-")
        if part or (whole and not self.part):
            found.append(DONE)
        if self.exponents and (part or (whole and not point)):
            found.append("e")
        return tuple(found)


Field = Category | Padded | Free


# ---- reading -----------------------------------------------------------------------------------------------------------
def read_columns(path: str, names: list[str] | None = None) -> Columns:
    """A csv, jsonl, json or parquet file; `names` for a csv without a header. Gaps become None, written numbers numbers."""
    if names:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [r for r in csv.reader(file, skipinitialspace=True) if r]
        if bad := next((i for i, r in enumerate(rows) if len(r) != len(names)), None):
            raise UserError(f"row {bad + 1} of {path} has {len(rows[bad])} values", f"{len(names)} names are given")
        raw = {n: [r[i] for r in rows] for i, n in enumerate(names)}
    else:
        whole = table(Path(path))
        raw = {n: column(path, whole, n) for n in whole[0]}
    return {n: _typed(values, f"'{n}' of {path}") for n, values in raw.items()}


def _typed(values: list[Any], where: str) -> list[Any]:
    found = [None if v is None or v in GAPS or (isinstance(v, float) and math.isnan(v)) else v for v in values]
    present = [v for v in found if v is not None]
    if any(isinstance(v, (list, dict)) for v in present):
        raise UserError(f"{where} holds lists or objects", "a cell is one value", "flatten the table first")
    if any(isinstance(v, float) and math.isinf(v) for v in present):
        raise UserError(f"{where} holds an infinite number", how="leave the row out")
    if present and all(isinstance(v, str) and is_number(v) for v in present):
        whole = all(re.fullmatch(r"-?\d{1,18}", v) for v in present)
        return [None if v is None else int(v) if whole else float(v) for v in found]
    return found


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """The rows of a table of columns."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def columns_of(rows: list[dict[str, Any]], names: list[str]) -> Columns:
    """The columns of rows."""
    return {n: [r.get(n) for r in rows] for n in names}


def take(columns: Columns, which: Any) -> Columns:
    """The rows of these numbers."""
    return {n: [v[int(i)] for i in which] for n, v in columns.items()}


# ---- fields ------------------------------------------------------------------------------------------------------------
def left_out(columns: Columns, ids: bool = False) -> dict[str, str]:
    """Columns that nothing can be learnt from, with the reason: empty ones, and (unless `ids`) those that number or name the rows."""
    found = {}
    for name, values in columns.items():
        present = [v for v in values if v is not None]
        if not present:
            found[name] = "all values are missing"
        elif ids or len(present) <= 20:
            continue
        elif all(type(v) is int for v in present):
            if len(set(present)) == len(present) == max(present) - min(present) + 1:
                found[name] = "it numbers the rows"
        elif all(isinstance(v, str) for v in present) and _dated(present) is None and len(set(present)) > len(present) / 2:
            found[name] = "most of its values occur once"
    return found


def field(name: str, values: list[Any], text: Any = None) -> Field:
    """The field of one column. `text(word)` gives the symbols of a word in the text form, where numbers are Free."""
    present = [v for v in values if v is not None]
    gaps = len(present) < len(values)
    numeric = all(type(v) in (int, float) for v in present)
    if not numeric or not present:
        form = None if text else _dated(present)
        if form:
            counted = [_counted(v, form, 0) for v in present]
            return Padded(name, min(counted), max(counted), 0, form, gaps)
        known = tuple({(type(v).__name__, v): v for v in present}.values())
        words = tuple(text(str(v)) if text else (f"{name}={i}",) for i, v in enumerate(known))
        if len(set(words)) < len(words):
            raise UserError(f"'{name}' has two values that are written alike", "they would be one value afterwards", "rename one")
        return Category(name, known, words, gaps)
    decimals = max(_decimals(v) for v in present)
    whole = all(type(v) is int for v in present)
    low, high = (f(present) for f in (min, max))
    if not text and decimals <= 6 and (high - low) * 10**decimals < 10**12 and abs(high) + abs(low) < 10**15:
        counted = [_counted(v, "decimal", decimals) for v in present]
        return Padded(name, min(counted), max(counted), decimals, "integer" if whole else "decimal", gaps)
    texts = [repr(v if whole else float(v)) for v in present]
    mantissas = [t.partition("e")[0].lstrip("-").partition(".") for t in texts]
    exponents = tuple(sorted({t[t.index("e") :] for t in texts if "e" in t}))
    part = 0 if whole else max(1, *(len(m[2]) for m in mantissas))
    return Free(name, max(len(m[0]) for m in mantissas), part, any(t[0] == "-" for t in texts), exponents, gaps)


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 99


def _counted(value: Any, form: str, decimals: int) -> int:
    """The whole number that stands for a value; ValueError where it is none."""
    if form == "date":
        return date.fromisoformat(value).toordinal()
    if form.startswith("moment"):
        return round((datetime.fromisoformat(value) - _START).total_seconds())
    scaled = Decimal(repr(value)).scaleb(decimals)
    if scaled != int(scaled):
        raise ValueError(value)
    return int(scaled)


def _dated(values: list[Any]) -> str | None:
    """Whether a column of text holds ISO dates, or moments to the second, in one form."""
    for form in ("date", "moment", "moment T"):
        try:
            if values and all(isinstance(v, str) and Padded("", 0, 0, 0, form)._value(_counted(v, form, 0)) == v for v in values):
                return form
        except (ValueError, TypeError, OverflowError):
            continue
    return None
