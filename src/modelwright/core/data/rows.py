"""Token rows: the table that training reads, packing of plain texts, padding and collation. What is cut or padded is counted."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.chats import render_chat
from modelwright.core.data.read import one_kind
from modelwright.core.errors import UserError

IGNORE = -100


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


def tokenize(documents: list[Any], tokenizer: Any, vocab: int, context: int) -> Rows:
    """Rows of `context` tokens. Texts are packed end to end with an end token between them, nothing dropped; a chat is
    one row, cut at `context` (counted in `facts`). Raises UserError for a token id that the model has no embedding for."""
    if one_kind(documents, "the data") != "messages":
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
