"""Tables on disk as columns: csv, jsonl, json (rows or columns) and parquet, plain or gzipped; each value as it stands there."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, did_you_mean

Table = tuple[list[str], Callable[[str], list[Any]]]  # column names, and a column's values
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def table(path: Path) -> Table:
    """Column names and a way to a column. Raises UserError for an empty file, one that does not parse, an unknown ending."""
    if not path.is_file():
        raise UserError(f"no file at {path}", how="check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty", how="give data with at least one row")
    kind, packed = (Path(path.stem).suffix, True) if path.suffix == ".gz" else (path.suffix, False)
    try:
        if kind == ".parquet" and not packed:
            from pyarrow import parquet

            return parquet.read_schema(path).names, lambda name: parquet.read_table(path, columns=[name]).column(name).to_pylist()
        with gzip.open(path, "rt", encoding="utf-8", newline="") if packed else open(path, encoding="utf-8", newline="") as file:
            if kind == ".csv":
                csv.field_size_limit(1 << 30)
                return _rows(list(csv.DictReader(file, strict=True)), path)
            if kind == ".jsonl":
                return _rows([json.loads(line) for line in file if line.strip()], path)
            if kind == ".json":
                whole = json.load(file)
                return _columns(whole, path) if isinstance(whole, dict) else _rows(whole, path)
    except (ValueError, csv.Error, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path} does not parse", str(error).splitlines()[0]) from None
    raise UserError(f"{path} has an unknown ending '{path.suffix}'", "text, jsonl, json, csv and parquet are read", "convert or rename it")


def column(path: Path, of: Table, name: str) -> list[Any]:
    """The values of one column; UserError with the nearest name when there is none."""
    if name not in of[0]:
        raise UserError(f"{path} has no column '{name}'", how=did_you_mean(name, of[0]))
    return of[1](name)


def numbers(values: list[Any], where: str) -> np.ndarray:
    """A column as float64; UserError that names the first row which is missing, not a number, or not finite."""
    for i, v in enumerate(values):
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not np.isfinite(v):
            raise UserError(f"row {i + 1} of {where} is {v!r}", "a finite number is needed", "fix or drop the row")
    return np.asarray(values, dtype=np.float64)


def _columns(whole: dict[str, Any], path: Path) -> Table:
    lists = {k: v for k, v in whole.items() if isinstance(v, list)}
    if not lists or len({len(v) for v in lists.values()}) > 1 or not next(iter(lists.values())):
        raise UserError(f"{path} does not parse as a table", "it must hold a list of objects, or columns of one length")
    return list(lists), lists.__getitem__


def _rows(rows: Any, path: Path) -> Table:
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{path} does not parse as a table", "it must hold a list of objects", "write one object per row")
    if ".csv" in path.suffixes[-2:]:
        if uneven := [i + 2 for i, r in enumerate(rows) if None in r or None in r.values()]:
            raise UserError(
                f"{path} does not parse", f"row {uneven[0]} has another number of columns than the head", "quote commas in the text"
            )
        for name in rows[0] if rows else ():
            if all(_NUMBER.fullmatch(r[name]) for r in rows):
                rows = [r | {name: int(r[name]) if r[name].isdigit() else float(r[name])} for r in rows]
    if not rows:
        raise UserError(f"{path} holds no text", "it has no rows", "give data with at least one row")
    return list(dict.fromkeys(k for r in rows for k in r)), lambda name: [r.get(name) for r in rows]
