"""From documents to token rows: encoding in batches, loss masks, end tokens, stores on disk. What is cut or left out is counted.

Texts and token ids become running text: one document after the other, each with what the tokenizer puts before a text and an end token
after it, cut into rows of `context` tokens. Chats and pairs stay documents of their own with a loss mask; several share a row where that
is asked for (core/data/packing.py).
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.core.data.chats import with_template
from modelwright.core.data.encode import Encoded, Encoder, Kind
from modelwright.core.data.packing import multipack
from modelwright.core.data.pairs import PairRows
from modelwright.core.data.read import Document, Ids, Source, Text, document_of, is_text
from modelwright.core.data.rows import IGNORE, Rows, TokenRows
from modelwright.core.data.store import StoredRows, StoreWriter, cache_folder, mixed, publish, store_key
from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors, fingerprint_path
from modelwright.core.knobs import Data

_VERSION = 3  # of the stores: raise it when the same input gives other rows
_BINS = 32  # that are packed together, at least
_UNUSED_DAYS = 30


def make_rows(
    data: Data, tokenizer: Any, vocab: int, context: int, *, kind: Kind = "causal", packing: bool = False, bins: int = 1, seed: int = 0
) -> TokenRows:
    """The rows of a source or of several, tokenised once and kept on disk. Raises UserError for what cannot be used.

    packing: several chats or pairs share a row; bins: rows of one optimizer step, filled together.
    """
    if data.sources:
        if data.path:
            raise UserError("data has a path and sources", "one of them must say where rows come from", "leave one out")
        each = [replace(data, sources=[], path=s.path, column=s.column, split=s.split, limit=s.limit) for s in data.sources]
        parts = [make_rows(d, tokenizer, vocab, context, kind=kind, packing=packing, bins=bins, seed=seed) for d in each]
        if not sum(s.weight for s in data.sources):
            raise UserError("the weights of all sources are 0", how="give one a weight")
        return mixed(parts, [s.weight for s in data.sources], seed)
    tokenizer = with_template(tokenizer, data.chat_template)
    folder = _stored(data, tokenizer, kind)
    facts = json.loads((folder / "facts.json").read_text())
    in_vocabulary(facts["low"], facts["high"], vocab)
    width = context - 2 if kind == "masked" else context  # room for the tokens around a text
    if width < 2:
        raise UserError(f"a context of {context} holds no text", "two tokens stand around it", "raise train.context")
    if kind == "ranked":
        return _pair_rows(folder, facts, width)
    rows = _running_rows(folder, facts, width) if facts["running"] else _document_rows(folder, facts, width, packing, bins, seed)
    rows.stops = facts["stops"]
    return rows


def _running_rows(folder: Path, facts: dict[str, Any], width: int) -> StoredRows:
    length = facts["length"]
    if length < 2:
        raise UserError("the data has fewer than two tokens", "there is nothing to predict", "give more text")
    count, told = -(-length // width), dict(facts["counts"]) | {"cut at the context": 0, "dropped tokens": 0}
    if count > 1 and length - (count - 1) * width < 2:  # one token predicts nothing
        count, told["dropped tokens"] = count - 1, 1
    rows = StoredRows(folder, width, 0, count, bytes=facts["bytes"], facts=told)
    rows.facts |= {"rows": count, "tokens": rows.tokens, "padded share": 1 - rows.tokens / (count * width)}
    return rows


def _document_rows(folder: Path, facts: dict[str, Any], width: int, packing: bool, bins: int, seed: int) -> StoredRows:
    ends, firsts = np.load(folder / "ends.npy"), np.load(folder / "firsts.npy")
    lengths, told = np.minimum(np.diff(ends, prepend=0), width), dict(facts["counts"])
    told["cut at the context"] = int((np.diff(ends, prepend=0) > width).sum())
    usable = np.flatnonzero(firsts < width)
    if len(usable) < len(firsts):
        told["left out: prompt longer than the context"] = int(len(firsts) - len(usable))
    if not len(usable):
        raise UserError("no token of the data is to be learnt", _why(told), "check the roles or the column, or raise train.context")
    if packing:
        together = bins * -(-_BINS // bins)
        plan = [[int(usable[j]) for j in b] for b in multipack(lengths[usable].tolist(), width, together, seed)]
    else:
        plan = [[int(i)] for i in usable]
    rows = StoredRows(folder, width, bins=plan, packed=packing, facts=told)
    tokens = int(lengths[usable].sum())
    rows.facts |= {
        "rows": len(plan),
        "tokens": tokens,
        "fill" if packing else "padded share": _share(tokens, plan, lengths, width, packing),
    }
    return rows


def _pair_rows(folder: Path, facts: dict[str, Any], width: int) -> PairRows:
    """Pairs that fit the context; an answer that is cut would be judged for something else."""
    longest = np.diff(np.load(folder / "ends.npy"), prepend=0).reshape(-1, 2).max(1)
    fit, told = np.flatnonzero(longest <= width), dict(facts["counts"])
    if len(fit) < len(longest):
        told["left out: longer than the context"] = int(len(longest) - len(fit))
    if not len(fit):
        raise UserError("no pair fits the context", _why(told), f"raise train.context above {width}")
    rows = PairRows(folder, width, bins=[[2 * int(i), 2 * int(i) + 1] for i in fit], facts=told, stops=facts["stops"])
    rows.facts |= {"rows": len(rows), "tokens": rows.tokens}
    return rows


def _share(tokens: int, plan: list[list[int]], lengths: np.ndarray, width: int, packing: bool) -> float:
    if packing:
        return tokens / (len(plan) * width)
    return 1 - tokens / (len(plan) * int(max(lengths[b[0]] for b in plan)))


def _why(counts: dict[str, int]) -> str:
    told = ", ".join(f"{what}: {n}" for what, n in counts.items() if n and what != "documents")
    return told or "every label is masked"


def _stored(data: Data, tokenizer: Any, kind: Kind) -> Path:
    """The store of one source; made by the first process that needs it while the others wait."""
    path = Path(str(data.path)).expanduser()
    there = path.exists()
    if not there and (is_text(data) or path.is_absolute()):
        raise UserError(f"no data at {path}", how="check the path")
    source_key = fingerprint_path(path) if there else [str(data.path), data.split, time.strftime("%Y-%m-%d")]
    settings = [data.column, data.limit, data.refused, str(path.suffix)]
    key = store_key(_VERSION, source_key, settings, _tokenizer_key(tokenizer), kind)
    home = cache_folder()
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    folder = home / key
    with _locked(home / f"{key}.lock"):
        if not (folder / "facts.json").is_file():
            _clean(home)
            shutil.rmtree(folder, ignore_errors=True)
            part = home / f"{key}.part"
            shutil.rmtree(part, ignore_errors=True)
            try:
                _write_store(part, Source(data), tokenizer, kind)
                publish(part, folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        os.utime(folder)
    return folder


def _write_store(part: Path, source: Source, tokenizer: Any, kind: Kind) -> None:
    documents = iter(source)
    first = next(documents, None)
    if first is None:
        raise UserError(f"{source.data.path} holds no text", _why(source.counts), "give data with at least one row")
    running = isinstance(first[1], (Text, Ids)) and kind != "ranked"
    encoder = Encoder(tokenizer, kind, alpaca=source.format == "alpaca")

    def every() -> Iterator[tuple[int, Document]]:
        yield first
        yield from documents

    writer, size, firsts = StoreWriter(part, not running, not running), 0, []
    if kind == "ranked":
        pieces: Iterator[Encoded] = chain.from_iterable(encoder.preferences(every(), source.refuse))
    else:
        pieces = (encoder.running if running else encoder.documents)(every(), source.refuse)
    for piece in pieces:
        writer.add(piece.ids, piece.learnt)
        size += piece.bytes
        if piece.learnt is not None:
            learnt = np.flatnonzero(piece.learnt[1:])
            firsts.append(int(learnt[0]) + 1 if len(learnt) else np.iinfo(np.int32).max)
    counts: dict[str, Any] = {"format": source.format, "documents": encoder.counts.pop("documents", 0), **source.counts, **encoder.counts}
    if not writer.tokens:
        writer.close({})
        raise UserError(
            "no token of the data is to be learnt",
            _why({k: v for k, v in counts.items() if k != "format"}),
            "check the roles or the column",
        )
    if not running:
        np.save(part / "firsts.npy", np.asarray(firsts, np.int64))
    facts = {"running": running, "bytes": size, "counts": counts, "low": writer.low, "high": writer.high, "stops": encoder.stops}
    writer.close(facts)


def _tokenizer_key(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = (
        json.dumps(json.loads(backend.to_str()) | {"truncation": None, "padding": None})
        if backend
        else str(sorted(tokenizer.get_vocab().items()))
    )
    return [store_key(words), tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]


def _clean(home: Path) -> None:
    """Remove stores that nobody used for a month."""
    for old in home.iterdir():
        if time.time() - old.stat().st_mtime > _UNUSED_DAYS * 86400:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with disk_errors(file), open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def tokenize(documents: list[Any], tokenizer: Any, vocab: int, context: int) -> Rows:
    """Rows in memory of documents that are at hand: strings, chats or token ids (as `read` gives them), packed and masked as above."""

    def refuse(number: int, why: str) -> None:
        raise UserError(f"document {number} cannot be used", why)

    encoder = Encoder(tokenizer)
    as_documents: list[Document] = []
    for number, d in enumerate(documents, 1):
        try:
            as_documents.append(document_of(d))
        except ValueError as error:
            refuse(number, str(error))
    numbered = list(enumerate(as_documents, 1))
    if numbered and isinstance(numbered[0][1], (Text, Ids)):
        pieces = list(encoder.running(numbered, refuse))
        flat = np.concatenate([p.ids for p in pieces]) if pieces else np.zeros(0, np.int32)
        return _rows_of_stream(flat, sum(p.bytes for p in pieces), encoder, vocab, context)
    whole = [(p.ids, p.learnt) for p in encoder.documents(numbered, refuse) if p.learnt is not None]
    encoder.counts["cut at the context"] = sum(len(ids) > context for ids, _ in whole)
    kept = [(ids[:context], learnt[:context]) for ids, learnt in whole]
    if not kept or not any(k[1][1:].any() for k in kept):
        raise UserError("no token of the data is to be learnt", _why(encoder.counts), "check the roles or the column")
    n, t = len(kept), max(len(ids) for ids, _ in kept)
    rows = Rows(
        torch.zeros(n, t, dtype=torch.int32), torch.full((n, t), IGNORE, dtype=torch.int32), torch.tensor([len(i) for i, _ in kept])
    )
    for i, (ids, learnt) in enumerate(kept):
        row = torch.from_numpy(ids.astype(np.int32))
        rows.ids[i, : len(ids)] = row
        rows.labels[i, : len(ids)] = torch.where(torch.from_numpy(learnt), row, IGNORE)
    in_vocabulary(int(rows.ids.min()), int(rows.ids.max()), vocab)
    rows.stops = encoder.stops
    rows.facts |= encoder.counts | {"rows": n, "tokens": rows.tokens, "padded share": 1 - rows.tokens / rows.ids.numel()}
    return rows


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of one chat, and which of them are learnt. Raises UserError where the chat or the template does not allow it."""

    def refuse(number: int, why: str) -> None:
        raise UserError("the chat cannot be used", why)

    found = list(Encoder(tokenizer).documents([(1, document_of(messages))], refuse))
    if not found or found[0].learnt is None:
        raise UserError("no token of the chat is to be learnt", "the assistant says nothing in it")
    return found[0].ids.tolist(), found[0].learnt.tolist()


def _rows_of_stream(flat: np.ndarray, size: int, encoder: Encoder, vocab: int, context: int) -> Rows:
    if len(flat) < 2:
        raise UserError("the data has fewer than two tokens", "there is nothing to predict", "give more text")
    in_vocabulary(int(flat.min()), int(flat.max()), vocab)
    n = -(-len(flat) // context)
    ids = torch.zeros(n * context, dtype=torch.int32)
    ids[: len(flat)] = torch.from_numpy(flat.astype(np.int32))
    ids, lengths = ids.view(n, context), torch.full((n,), context)
    lengths[-1] = len(flat) - (n - 1) * context
    labels = torch.where(torch.arange(context) < lengths[:, None], ids, IGNORE)
    facts = encoder.counts | {"cut at the context": 0, "dropped tokens": 0}
    if n > 1 and lengths[-1] < 2:  # one token predicts nothing
        ids, labels, lengths, facts["dropped tokens"] = ids[:-1], labels[:-1], lengths[:-1], 1
    rows = Rows(ids, labels, lengths, size, facts)
    rows.facts |= {"rows": len(rows), "tokens": rows.tokens, "padded share": 1 - rows.tokens / rows.ids.numel()}
    return rows


def in_vocabulary(low: int, top: int, vocab: int) -> None:
    """UserError for a token id that the model has no embedding for."""
    if top >= vocab or low < 0:
        raise UserError(
            f"token id {top if top >= vocab else low} is out of range",
            f"the model has {vocab} embeddings (ids 0 to {vocab - 1})",
            "use the tokenizer that belongs to the model",
        )
