"""Documents in, documents out: Arrow record batches of rows from jsonl (plain or gz), parquet, csv or text files, and back to jsonl.

Rows that cannot be read are counted by reason and by file; nothing else is lost with them.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data

BATCH = 300_000  # characters of text; a batch and what is made from it stay in the processor's cache
LINE = 1 << 28  # bytes; a longer line is no document
_TEXT = {".txt", ".md", ".rst", ".html"}
_KNOWN = {".jsonl", ".gz", ".parquet", ".csv", *_TEXT}
PLACE = "_row"  # column: number of the row over all files, from 0


class Source:
    """The documents of a file or folder, in the order of names and rows. `dropped` counts what could not be read."""

    def __init__(self, data: Data, *, batch: int = BATCH):
        if not data.path:
            raise UserError("no data was given", how="give data: {path: FILE, column: NAME}")
        self.path, self.column, self.limit, self.batch = Path(data.path).expanduser(), data.column or "text", data.limit, batch
        self.files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.suffix in _KNOWN and p.is_file())
        if not self.files:
            why = "there is no such file or folder" if not self.path.exists() else f"no file in it ends in {', '.join(sorted(_KNOWN))}"
            raise UserError(f"no documents at {self.path}", why, "check the path")
        for file in self.files:
            if file.suffix not in _KNOWN:
                raise UserError(f"{file} has an unknown ending", f"read are {', '.join(sorted(_KNOWN))}", "convert or rename it")
        self.dropped: Counter[str] = Counter()
        self.rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Batches with all columns, the text as strings, and PLACE; a column that mixes types becomes json text."""
        self.rows, self.dropped = 0, Counter()
        rows: list[dict[str, Any]] = []
        size = 0
        for row in self._rows():
            rows.append(row | {PLACE: self.rows})
            self.rows += 1
            size += len(row[self.column])
            if size >= self.batch:
                yield _batch(rows)
                rows, size = [], 0
            if self.limit and self.rows >= self.limit:
                break
        if rows:
            yield _batch(rows)
        if not self.rows:
            lost = "; ".join(f"{n} {why}" for why, n in self.dropped.most_common(3))
            raise UserError(f"{self.path} holds no documents", lost or "it is empty", "give data with at least one row")

    def _rows(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            for row in self._file(file):
                text = row.get(self.column)
                if text is None and self.column not in row:
                    if self.rows == 0 and not self.dropped:
                        raise UserError(f"{file} has no column '{self.column}'", how=did_you_mean(self.column, list(row)))
                    self._drop(file, f"rows without '{self.column}'")
                elif not isinstance(text, str):
                    self._drop(file, f"rows whose '{self.column}' is no text")
                else:
                    yield row

    def _drop(self, file: Path, why: str) -> None:
        self.dropped[f"{why} ({file.name})"] += 1

    def _file(self, file: Path) -> Iterator[dict[str, Any]]:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            try:
                for batch in parquet.ParquetFile(file).iter_batches(1000):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError):
                self._drop(file, "rest of a damaged parquet file")
        elif file.suffix in _TEXT:
            yield {self.column: file.read_text(encoding="utf-8", errors="replace"), "name": str(file.relative_to(self.path.parent))}
        elif file.suffix == ".csv":
            from modelwright.core.data.tables import table

            names, values = table(file)
            yield from (dict(zip(names, row, strict=True)) for row in zip(*(values(n) for n in names), strict=True))
        else:
            yield from self._lines(file)

    def _lines(self, file: Path) -> Iterator[dict[str, Any]]:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
            while True:
                try:
                    line = lines.readline(LINE)
                except (OSError, EOFError, zlib.error):
                    return self._drop(file, "rest of a damaged gz file")
                if not line:
                    return None
                if len(line) == LINE and not line.endswith(b"\n"):
                    self._drop(file, f"lines above {LINE >> 20} MiB")
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(LINE)
                    continue
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    self._drop(file, "lines that are no json")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    self._drop(file, "lines that hold no object")


def _batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(k for r in rows for k in r):
        values = [r.get(name) for r in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            columns[name] = pa.array([_plain(v) for v in values])
    return pa.RecordBatch.from_pydict(columns)


def _plain(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


class Sink:
    """Rows out as jsonl. `write` takes a batch, which rows to keep, and columns to add."""

    def __init__(self, file: Path):
        self.out = open(file, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self.rows = self.characters = 0

    def write(self, rows: Iterable[dict[str, Any]], column: str = "text") -> None:
        for row in rows:
            row = {k: v for k, v in row.items() if k != PLACE}
            self.out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            self.rows += 1
            self.characters += len(row.get(column) or "")

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *error: object) -> None:
        self.out.close()
