"""From data to token rows: reading, chat rendering, packing, masks. What is cut or padded is counted, never silent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data
from modelwright.core.tables import Table, table

IGNORE = -100
_TEXT = {".txt", ".md", ".py", ".rst", ".tex", ".html"}


@dataclass
class Rows(torch.utils.data.Dataset):
    """Token rows of one length: ids (N, T) int32, labels (N, T) with -100 where nothing is learnt, lengths (N,).

    weights (N, T) weigh the learnt tokens. segments (N, T) number the texts that share a row, -1 where it is padded; texts
    of one row do not see each other and each has positions from 0.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    bytes: int = 0  # of the text, for bits per byte; 0 when unknown
    facts: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None
    segments: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {"input_ids": self.ids[i], "labels": self.labels[i], "length": self.lengths[i], "example_id": i}
        return row | {k: v[i] for k, v in (("weights", self.weights), ("segments", self.segments)) if v is not None}

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def split(self, at: int) -> tuple["Rows", "Rows"]:
        """The first `at` rows and the rest; bytes are shared out by tokens."""
        parts = []
        for s in (slice(None, at), slice(at, None)):
            n = int(self.lengths[s].sum())
            size = round(self.bytes * n / max(self.tokens, 1))
            extra = [v if v is None else v[s] for v in (self.weights, self.segments)]
            parts.append(Rows(self.ids[s], self.labels[s], self.lengths[s], size, self.facts, *extra))
        return parts[0], parts[1]


class Filled(torch.utils.data.Dataset):
    """Rows and enough empty ones that every optimizer step of every process is full; an empty row counts for nothing."""

    def __init__(self, rows: Rows, multiple: int):
        self.rows, self.n = rows, -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < len(self.rows):
            return self.rows[i]
        row = self.rows[0]
        empty = {"labels": IGNORE, "segments": -1, "input_ids": 0, "weights": 0}
        return {k: torch.full_like(row[k], v) for k, v in empty.items() if k in row} | {"length": torch.tensor(0), "example_id": -1}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch cut to its longest row; the attention mask is left out when nothing is padded.

    Rows that hold several texts get position ids instead, from which transformers keeps the texts apart.
    """
    lengths = torch.stack([r["length"] for r in rows])
    longest = max(int(lengths.max()), 2)
    batch = {k: torch.stack([r[k][:longest] for r in rows]).long() for k in ("input_ids", "labels")}
    batch["example_id"] = torch.tensor([r["example_id"] for r in rows])
    batch["real"] = torch.arange(longest) < lengths[:, None]  # (B, T): no padding
    if "weights" in rows[0]:
        batch["weights"] = torch.stack([r["weights"][:longest] for r in rows])
    if "segments" in rows[0]:
        batch["segments"] = torch.stack([r["segments"][:longest] for r in rows]).long()
        batch["position_ids"] = positions(batch["segments"])
    elif int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths.clamp(min=1)[:, None]).long()
    return batch


def positions(segments: Tensor) -> Tensor:
    """Position of each token within its text, from (B, T) text numbers."""
    at = torch.arange(segments.shape[1]).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return at - torch.where(begins, at, 0).cummax(1).values


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
    _one_kind(values, f"column '{name}' of {path}")
    return values


def _one_kind(values: list[Any], where: str) -> str:
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


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat by the tokenizer's template, and a mask that is true on what the assistant says."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template", "the data holds messages", "use a chat model's tokenizer, or a text column")
    for i, message in enumerate(messages):
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f"message {i} of a chat lacks role or content", f"it has {', '.join(map(str, message))}", "give both as text")
    ids: list[int] = []
    mask: list[bool] = []

    def upto(n: int, prompt: bool, learnt: bool) -> None:
        nonlocal ids, mask
        now = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=prompt, return_dict=False)
        if now[: len(ids)] != ids:
            raise UserError(
                "the chat template rewrites earlier turns", "the assistant's tokens cannot be told apart", "use another template"
            )
        mask += [learnt] * (len(now) - len(ids))
        ids = now

    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:  # what opens the turn is given, what follows is learnt
            upto(i, True, False)
        upto(i + 1, False, message["role"] == "assistant" and i > 0)
    return ids, mask


def tokenize(documents: list[Any], tokenizer: Any, vocab: int, context: int) -> Rows:
    """Rows of `context` tokens. Texts are packed end to end with an end token between them, nothing dropped; a chat is
    one row, cut at `context` (counted in `facts`). Raises UserError for a token id that the model has no embedding for."""
    if _one_kind(documents, "the data") != "messages":
        return _pack(documents, tokenizer, vocab, context)
    kept, cut = [], 0
    for messages in documents:
        ids, mask = render_chat(tokenizer, messages)
        cut += len(ids) > context
        kept.append((ids[:context], mask[:context]))
    n, t = len(kept), max(len(ids) for ids, _ in kept)
    rows = Rows(
        torch.zeros(n, t, dtype=torch.int32),
        torch.full((n, t), IGNORE, dtype=torch.int32),
        torch.tensor([len(ids) for ids, _ in kept]),
        facts={"documents": n, "cut at the context": cut},
    )
    for i, (ids, mask) in enumerate(kept):
        row = torch.tensor(ids, dtype=torch.int32)
        rows.ids[i, : len(ids)] = row
        rows.labels[i, : len(ids)] = torch.where(torch.tensor(mask), row, IGNORE)
    _in_vocabulary(int(rows.ids.min()), int(rows.ids.max()), vocab)
    return _finish(rows)


def _pack(documents: list[Any], tokenizer: Any, vocab: int, context: int) -> Rows:
    size = 0
    if isinstance(documents[0], str):
        if tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "the data is text", "add tokenizer files, or give a column of token ids")
        size = sum(len(d.encode()) for d in documents)
        documents = tokenizer(documents, add_special_tokens=False)["input_ids"]
    end = None if tokenizer is None else tokenizer.eos_token_id
    flat = [i for d in documents for i in (d if end is None or d[-1:] == [end] else [*d, end])]
    if len(flat) < 2:
        raise UserError("the data has fewer than two tokens", "there is nothing to predict", "give more text")
    _in_vocabulary(min(flat), max(flat), vocab)
    stream = torch.tensor(flat, dtype=torch.int32)
    n = -(-len(stream) // context)
    ids = torch.zeros(n * context, dtype=torch.int32)
    ids[: len(stream)] = stream
    ids = ids.view(n, context)
    lengths = torch.full((n,), context)
    lengths[-1] = len(stream) - (n - 1) * context
    labels = torch.where(torch.arange(context) < lengths[:, None], ids, IGNORE)
    facts = {"documents": len(documents), "cut at the context": 0, "dropped tokens": 0}
    if n > 1 and lengths[-1] < 2:  # one token predicts nothing
        ids, labels, lengths, facts["dropped tokens"] = ids[:-1], labels[:-1], lengths[:-1], 1
    return _finish(Rows(ids, labels, lengths, size, facts))


def _finish(rows: Rows) -> Rows:
    rows.facts |= {"rows": len(rows), "tokens": rows.tokens, "padded share": 1 - rows.tokens / rows.ids.numel()}
    if not bool((rows.labels[:, 1:] != IGNORE).any()):
        raise UserError("no token of the data is to be learnt", "every label is masked", "check the roles or the column")
    return rows


def _in_vocabulary(low: int, top: int, vocab: int) -> None:
    if top >= vocab or low < 0:
        raise UserError(
            f"token id {top if top >= vocab else low} is out of range",
            f"the model has {vocab} embeddings (ids 0 to {vocab - 1})",
            "use the tokenizer that belongs to the model",
        )


def check_vocabulary(tokenizer: Any, vocab: int, where: Any) -> None:
    """UserError when the tokenizer can give ids that the model has no embedding for."""
    if tokenizer is not None and (top := max(tokenizer.get_vocab().values(), default=0)) >= vocab:
        raise UserError(
            f"the tokenizer in {where} does not belong to the model",
            f"its highest id is {top} and the model has {vocab} embeddings",
            "use the tokenizer that was saved with the model",
        )
