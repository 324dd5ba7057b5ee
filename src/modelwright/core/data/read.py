"""From a source to documents: strings, chats or token ids, out of text files, tables and hub datasets."""

from pathlib import Path
from typing import Any

from modelwright.core.data.tables import Table, table
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data

_TEXT = {".txt", ".md", ".py", ".rst", ".tex", ".html"}


def read(data: Data) -> list[Any]:
    """The documents of a source: strings, chats (lists of messages) or lists of token ids, in file order.

    Raises UserError for a missing file, an empty one, or a column that is not there.
    """
    if not data.path:
        raise UserError("no data was given", how="give data: {path: FILE, column: NAME}")
    path = Path(data.path).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT and p.is_file())
        documents: list[Any] = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    elif path.suffix in _TEXT and path.is_file():
        documents = [path.read_text(encoding="utf-8", errors="replace")]
    else:
        documents = _column(read_table(data), data, path)
    documents = [d for d in documents if d is not None and len(d)]
    if not documents:
        raise UserError(f"{path} holds no text", "every row is empty" if path.exists() else "", "give data with at least one row")
    return documents[: data.limit]


def is_text(data: Data) -> bool:
    """Whether a source is plain text: a text file or a folder of them."""
    path = Path(data.path or "").expanduser()
    return path.is_dir() or path.suffix in _TEXT


def read_table(data: Data) -> Table:
    """Column names of a file or hub dataset, and a way to a column."""
    if not data.path:
        raise UserError("no data was given", how="give data: {path: FILE, column: NAME}")
    path = Path(data.path).expanduser()
    if path.is_file():
        return table(path)
    if path.is_absolute() or path.suffix or data.path.startswith("."):
        raise UserError(f"no data at {path}", how="check the path")
    return _hub(data)


def _hub(data: Data) -> Table:
    from datasets import load_dataset

    try:
        rows = load_dataset(data.path, split=data.split)
        return rows.column_names, lambda name: list(rows[name])
    except Exception as error:
        raise UserError(
            f"{data.path} is neither a file nor a hub dataset that can be fetched", str(error).strip().splitlines()[0]
        ) from None


def _column(table: Table, data: Data, path: Path) -> list[Any]:
    names, values_of = table
    usual = next((n for n in ("text", "messages", "input_ids") if n in names), None)
    name = data.column or usual or (names[0] if len(names) == 1 else None)
    if name is None:
        raise UserError(f"{path} has several columns", f"they are {', '.join(names)}", "say which one: data: {path: ..., column: NAME}")
    if name not in names:
        raise UserError(f"{path} has no column '{name}'", how=did_you_mean(name, names))
    values = [v for v in values_of(name) if v is not None]
    one_kind(values, f"column '{name}' of {path}")
    return values


def one_kind(values: list[Any], where: str) -> str:
    kinds = {_kind(v) for v in values if not isinstance(v, (str, list)) or len(v)}
    if len(kinds) > 1 or kinds - {"text", "token ids", "messages"}:
        raise UserError(f"{where} holds {' and '.join(sorted(kinds))}", "text, messages or token ids are needed", "choose another column")
    return next(iter(kinds), "text")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(type(v) is int for v in value):
        return "token ids"
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        return "messages"
    return f"lists of {type(value[0]).__name__} values" if isinstance(value, list) else f"{type(value).__name__} values"
