"""Tables on disk: csv, jsonl, json (rows or columns) and parquet, plain or gzipped. `table` gives whole columns, `records` streams rows.

Every value is what stands in the file. A csv column becomes numeric only if each of its values is written as a number is: `007`, `01`
and `1e999` stay what they are. A key or header that stands twice is refused, since one of the two would be lost.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from modelwright.core.errors import UserError, did_you_mean, short, shown

Table = tuple[list[str], Callable[[str], list[Any]]]  # column names, and a column's values
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
_BLOCK = 1 << 22


def table(path: Path) -> Table:
    """Column names and a way to a column. Raises UserError for an empty file, one that does not parse, an unknown ending."""
    kind = _kind(path)
    if kind == ".parquet":
        with _parse_errors(path):
            from pyarrow import parquet

            names = _distinct(parquet.read_schema(path).names, path)
        return names, lambda name: _parquet_column(path, name)
    if kind == ".json":
        with _parse_errors(path), _opened(path) as file:
            whole = _loads(file.read().decode("utf-8-sig"))
        if isinstance(whole, dict):
            return _columns(whole, path)
        if not isinstance(whole, list) or not all(isinstance(r, dict) for r in whole):
            raise UserError(f"{path} does not parse as a table", "it must hold a list of objects", "write one object per row")
        rows = whole
    else:
        rows = list(records(path))
    if not rows:
        raise UserError(f"{path} holds no text", "it has no rows", "give data with at least one row")
    names = list(dict.fromkeys(k for r in rows for k in r))
    if kind != ".csv":
        return names, lambda name: [r.get(name) for r in rows]
    return names, lambda name: _typed([r[name] for r in rows])


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table one after the other, without holding the file in memory (json excepted). Values of a csv stay text."""
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_records(path)
    elif kind == ".csv":
        yield from _csv_records(path)
    elif kind == ".jsonl":
        with _parse_errors(path), _opened(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    row = _loads(text) if text.strip() else None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"line {number} of {path} does not parse", short(error), "repair or remove the line") from None
                if row is None and not text.strip():
                    continue
                if not isinstance(row, dict):
                    raise UserError(
                        f"line {number} of {path} is no object", "each line must be one JSON object", "write one object per line"
                    )
                yield row
    else:
        names, column_of = table(path)
        columns = [column_of(n) for n in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def column(path: Path | str | None, of: Table, name: str) -> list[Any]:
    """The values of one column; UserError with the nearest name when there is none."""
    if name not in of[0]:
        raise UserError(f"{path} has no column '{name}'", how=did_you_mean(name, of[0]))
    return of[1](name)


def numbers(values: list[Any], where: str) -> np.ndarray:
    """A column as float64; UserError that names the first row which is missing, not a number, or not finite."""
    for i, v in enumerate(values):
        finite = isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= 1.7e308
        if not finite:
            raise UserError(f"row {i + 1} of {where} is {shown(v)}", "a finite number is needed", "fix or drop the row")
    return np.asarray(values, dtype=np.float64)


# ---- formats -----------------------------------------------------------------------------------------------------------
def _kind(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no file at {path}", how="check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty", how="give data with at least one row")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in _ENDINGS or (kind == ".parquet" and path.suffix == ".gz"):
        raise UserError(
            f"{path} has an unknown ending '{path.suffix}'", "text, jsonl, json, csv and parquet are read", "convert or rename it"
        )
    return kind


@contextmanager
def _parse_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", f"byte {error.start} cannot be read", "convert it, as with iconv -t UTF-8") from None
    except (ValueError, RecursionError, EOFError, zlib.error, OSError) as error:  # ArrowInvalid is a ValueError, BadGzipFile an OSError
        raise UserError(f"{path} does not parse", short(error), "repair it, or save it again") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield file  # type: ignore[misc]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise ValueError(f"key '{twice}' stands twice in one object")
    return found


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_pairs)


def _distinct(names: list[str], path: Path) -> list[str]:
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"{path} has the column '{twice}' twice", "one of the two would be lost", "rename or remove one")
    return names


def _csv_records(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import csv, string

    with _parse_errors(path), _opened(path) as file:
        head = io.BytesIO(file.read(3))
        rest = file if head.getvalue() == b"\xef\xbb\xbf" else _Joined(head, file)
        first = rest.readline().decode("utf-8")
        names = _distinct(_header(first), path)
        options = csv.ReadOptions(column_names=names, block_size=_BLOCK)
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, string()), strings_can_be_null=False)
        try:
            reader = csv.open_csv(rest, options, csv.ParseOptions(newlines_in_values=True), convert)
        except ValueError as error:
            if "Empty CSV" in str(error):  # a header alone
                return
            raise
        for batch in reader:
            yield from batch.to_pylist()


def _header(line: str) -> list[str]:
    import csv

    return next(csv.reader([line.rstrip("\r\n")]))


class _Joined(io.RawIOBase):
    """A few bytes that were read ahead, and the file they came from."""

    def __init__(self, head: io.BytesIO, file: IO[bytes]):
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:  # type: ignore[override]
        got = self._head.read(n)
        return got + (self._file.read(n - len(got) if n >= 0 else -1) or b"")

    def readline(self, n: int | None = -1) -> bytes:  # type: ignore[override]
        got = self._head.readline()
        return got if got.endswith(b"\n") else got + self._file.readline()


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with _parse_errors(path):
        file = parquet.ParquetFile(path)
        _distinct(file.schema_arrow.names, path)
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _parquet_column(path: Path, name: str) -> list[Any]:
    from pyarrow import parquet

    with _parse_errors(path):
        return parquet.read_table(path, columns=[name]).column(name).to_pylist()


def _typed(values: list[str]) -> list[Any]:
    if all(_INTEGER.fullmatch(v) for v in values):
        return [int(v) for v in values]
    return [float(v) for v in values] if all(map(is_number, values)) else values


def is_number(text: str) -> bool:
    """Whether a value of a csv is written as a number is."""
    return _NUMBER.fullmatch(text) is not None


def _columns(whole: dict[str, Any], path: Path) -> Table:
    lists = {k: v for k, v in whole.items() if isinstance(v, list)}
    if not lists or len({len(v) for v in lists.values()}) > 1 or not next(iter(lists.values())):
        raise UserError(f"{path} does not parse as a table", "it must hold a list of objects, or columns of one length")
    return list(lists), lists.__getitem__
