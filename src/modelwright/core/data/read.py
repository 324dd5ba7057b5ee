"""From a source to documents: texts, chats, pairs, preferences or token ids, out of text files, tables and hub datasets, as a stream.

A source is recognised by its columns (`recognise`). Rows that hold nothing are counted; a row of another kind than the rest is refused by
its number, or left out and counted with `refused: drop`.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from modelwright.core.data.tables import Table, is_number, records, table
from modelwright.core.errors import UserError, did_you_mean, short, shown
from modelwright.core.knobs import Data

_TEXT = {".txt", ".md", ".py", ".rst", ".tex", ".html"}
_PIECE = 1 << 20  # characters of a text file that are handed on at once
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


@dataclass(frozen=True)
class Text:
    """A text, or a further piece of the one before: `begins` is false there. A piece begins after a line end and never with a space."""

    text: str
    begins: bool = True


@dataclass(frozen=True)
class Chat:
    """Messages with role and content, and the tools that the template may show."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """What is given and what is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt; each is text or messages, and `prompt` may be empty."""

    prompt: Any
    chosen: Any
    rejected: Any


@dataclass(frozen=True)
class Ids:
    """Token ids."""

    ids: list[int]


Document = Text | Chat | Pair | Preference | Ids


@dataclass
class Source:
    """One source as a stream of documents. `format` names the layout that was recognised; counts grow while it is read."""

    data: Data
    format: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data.path:
            raise UserError("no data was given", how="give data: {path: FILE, column: NAME}")
        self._path = Path(self.data.path).expanduser()
        self._columns: tuple[str, ...] = ()
        if is_text(self.data):
            self.format = "text file"
            self._rows: Iterator[dict[str, Any]] | None = None
        else:
            rows = iter_rows(self.data)
            first = next(rows, None)
            if first is None:
                raise UserError(f"{self._path} holds no text", "it has no rows", "give data with at least one row")
            ahead = [first, *islice(rows, 15)]
            self.format, self._columns = recognise(ahead, self.data)
            if ".csv" in self._path.suffixes[-2:] and all(is_number(r[self._columns[0]]) for r in ahead):
                raise UserError(
                    f"column '{self._columns[0]}' of {self._path} holds numbers",
                    "text, messages or token ids are needed",
                    "choose another column",
                )
            self._rows = chain(ahead, rows)

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        """Row number from 1, and the document."""
        if self._rows is None:
            yield from ((1, piece) for piece in _text_files(self._path, self.data.limit))
            return
        kind = None
        for number, row in enumerate(self._rows, 1):
            try:
                document = self._document(row)
            except _WrongColumn as error:
                if kind is None and self.data.refused == "stop":
                    what = f"column '{self._columns[0]}' of {self._path} {str(error).removeprefix('it ').split(', and ')[0]}"
                    raise UserError(what, "text, messages or token ids are needed", "choose another column") from None
                self.refuse(number, str(error))
                continue
            except ValueError as error:
                self.refuse(number, str(error))
                continue
            if document is None:
                self._count("rows without text")
                continue
            kind = kind or type(document)
            if type(document) is not kind:
                self.refuse(number, f"it holds {_NAMES[type(document)]} where the others hold {_NAMES[kind]}")
                continue
            yield number, document

    def refuse(self, number: int, why: str) -> None:
        """A row that cannot be used: UserError with its number, or counted where the source says `refused: drop`."""
        if self.data.refused == "stop":
            raise UserError(f"row {number} of {self._path} cannot be used", why, "repair it, or set data.refused: drop")
        self._count("rows refused")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _document(self, row: dict[str, Any]) -> Document | None:
        """A row as a document, None where it holds nothing. Raises ValueError for a row that cannot be used."""
        values = [row.get(c) for c in self._columns]
        if self.format == "alpaca":
            asked, more, told = (v if isinstance(v, str) else "" for v in values)
            return Pair(f"{asked}\n\n{more}" if more else asked, told) if asked and told else None
        if self.format == "prompt and completion":
            return _pair(values[0] or "", values[1] or "")
        if self.format == "chosen and rejected":
            prompt, chosen, rejected = values
            return Preference(prompt, chosen, rejected) if chosen and rejected else None
        value = values[0]
        if value is None or (isinstance(value, (str, list, dict)) and not value):
            return None
        return document_of(value, row.get("tools"))


def _pair(prompt: Any, completion: Any) -> Document | None:
    if not completion:
        return None
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list)):
            raise ValueError(f"its {name} is neither text nor messages")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(prompt, completion)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return Chat([*messages_of(prompt or []), *messages_of(answer)])


class _WrongColumn(ValueError):
    """A value of a kind that no row may have."""


_NAMES = {Text: "text", Chat: "messages", Pair: "a prompt and a completion", Preference: "two answers", Ids: "token ids"}


def recognise(rows: list[dict[str, Any]], data: Data) -> tuple[str, tuple[str, ...]]:
    """The layout of a table's rows, and the columns that it is read from. UserError where no layout fits."""
    names = list(dict.fromkeys(k for r in rows for k in r))
    has = set(names)
    if data.column:
        if data.column not in has:
            raise UserError(f"{data.path} has no column '{data.column}'", how=did_you_mean(data.column, names))
        return f"column {data.column}", (data.column,)
    for name in ("messages", "conversations", "conversation"):
        if name in has:
            return "messages" if name == "messages" else "sharegpt", (name,)
    if {"chosen", "rejected"} <= has:
        return "chosen and rejected", ("prompt", "chosen", "rejected")
    if {"prompt", "completion"} <= has:
        return "prompt and completion", ("prompt", "completion")
    if {"instruction", "output"} <= has:
        return "alpaca", ("instruction", "input", "output")
    for name in ("text", "input_ids"):
        if name in has:
            return {"text": "text", "input_ids": "token ids"}[name], (name,)
    if len(names) == 1:
        return f"column {names[0]}", (names[0],)
    raise UserError(f"{data.path} has several columns", f"they are {', '.join(names)}", "say which one: data: {path: ..., column: NAME}")


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with role and content: ShareGPT's from and value are renamed, content given in parts is joined where all is text."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    found = []
    for i, m in enumerate(value):
        if not isinstance(m, dict):
            raise ValueError(f"message {i} is no message but {shown(m)}")
        role = m.get("role", m.get("from"))
        content = m.get("content", m.get("value"))
        if not isinstance(role, str):
            raise ValueError(f"message {i} has no role: it has {', '.join(map(str, m))}")
        if "from" in m and role not in _ROLES:
            raise ValueError(f"message {i} is from '{role[:40]}'; known are {', '.join(_ROLES)}")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and p.get("type", "text") == "text" and isinstance(p.get("text"), str) for p in content):
                raise ValueError(f"message {i} has a part that is not text")
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str) and not (content is None and m.get("tool_calls")):
            raise ValueError(f"message {i} has no content as text")
        extra = {k: v for k, v in m.items() if k not in ("role", "from", "content", "value") and v is not None}
        found.append({"role": _ROLES.get(role, role) if "from" in m else role, "content": content or "", **extra})
    return found


def document_of(value: Any, tools: Any = None) -> Document:
    """A string, a list of token ids or of messages as a document. Raises ValueError for what is none of these, or no whole message."""
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, list) and all(type(v) is int for v in value):
        return Ids(value)
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        return Chat(messages_of(value), _tools(tools))
    if isinstance(value, (Text, Chat, Pair, Preference, Ids)):
        return value
    kind = f"lists of {type(value[0]).__name__} values" if isinstance(value, list) else f"{type(value).__name__} values"
    raise _WrongColumn(f"it holds {kind}, and text, messages or token ids are needed")


def _tools(value: Any) -> list[Any] | None:
    """Tools as a list; tables often hold them as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("its tools are text that is no JSON") from None
    return value if isinstance(value, list) and value else None


def read(data: Data) -> list[Any]:
    """All documents of a source in order, as strings, lists of messages, lists of token ids or the objects above; texts are whole."""
    found: list[Any] = []
    for _, document in Source(data):
        if isinstance(document, Text):
            if document.begins:
                found.append(document.text)
            else:
                found[-1] += document.text
        else:
            found.append(document.messages if isinstance(document, Chat) else document.ids if isinstance(document, Ids) else document)
    if not found:
        raise UserError(f"{data.path} holds no text", "every row is empty", "give data with at least one row")
    return found[: data.limit] if not is_text(data) else found


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
    rows = list(iter_rows(data))
    return list(dict.fromkeys(k for r in rows for k in r)), lambda name: [r.get(name) for r in rows]


def iter_rows(data: Data) -> Iterator[dict[str, Any]]:
    """The rows of a table file or a hub dataset, `limit` of them at most; a hub dataset with a limit is streamed."""
    path = Path(str(data.path)).expanduser()
    if path.is_file():
        yield from islice(records(path), data.limit)
        return
    if path.is_absolute() or path.suffix or str(data.path).startswith("."):
        raise UserError(f"no data at {path}", how="check the path")
    try:
        from datasets import load_dataset

        rows = load_dataset(data.path, split=data.split, streaming=data.limit is not None)
    except Exception as error:
        raise UserError(f"{data.path} is neither a file nor a hub dataset that can be fetched", short(error)) from None
    yield from islice(rows, data.limit)


# ---- text files --------------------------------------------------------------------------------------------------------
def _text_files(path: Path, limit: int | None) -> Iterator[Text]:
    """The pieces of one text file or of all in a folder; `limit` counts lines."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT and p.is_file())
        if not files:
            raise UserError(f"{path} holds no text", f"no file in it ends with {', '.join(sorted(_TEXT))}")
    else:
        files = [path]
    if not path.exists():
        raise UserError(f"no data at {path}", how="check the path")
    if sum(f.stat().st_size for f in files) == 0:
        raise UserError(f"{path} holds no text", "it is empty", "give data with at least one row")
    left = limit
    for file in files:
        for piece in _pieces(file):
            if left is not None:
                lines = piece.text.splitlines(keepends=True)
                piece = Text("".join(lines[:left]), piece.begins)
                left -= min(left, len(lines))
            if piece.text:
                yield piece
            if left == 0:
                return


def _pieces(file: Path) -> Iterator[Text]:
    """A file in pieces of about a million characters, cut after single line ends between two characters that are not white space."""
    kept, begins = "", True
    for block in _decoded(file):
        kept += block
        while len(kept) > _PIECE:
            cut = _cut(kept)
            if not cut:
                break
            yield Text(kept[:cut], begins)
            kept, begins = kept[cut:], False
    if kept:
        yield Text(kept, begins)


def _cut(text: str) -> int:
    """Where a piece may end: the last such place before `_PIECE`, else the first after it; 0 where there is none yet."""
    at = text.rfind("\n", 0, _PIECE)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", 0, at)
    at = text.find("\n", _PIECE)
    while 0 < at < len(text) - 1:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.find("\n", at + 1)
    return 0


def _decoded(file: Path) -> Iterator[str]:
    """UTF-8 (with or without a mark) or marked UTF-16; anything else is refused with the place of the first byte that does not fit."""
    with open(file, "rb") as f:
        head = f.read(2)
        f.seek(0)
        kind = "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        decoder = codecs.getincrementaldecoder(kind)()
        at, held = 0, ""
        while block := f.read(_PIECE):
            try:
                text = held + decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_text(file, at + error.start) from None
            if "\0" in text:
                raise UserError(f"{file} is not text", "it holds zero bytes", "give a text file")
            at += len(block)
            held = "\r" if text.endswith("\r") else ""  # its line end may begin the next block
            yield text.removesuffix(held).replace("\r\n", "\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise _not_text(file, at) from None
        if held:
            yield held


def _not_text(file: Path, at: int) -> UserError:
    return UserError(f"{file} is not UTF-8", f"byte {at} cannot be read", "convert it, as with iconv -f latin1 -t UTF-8")
