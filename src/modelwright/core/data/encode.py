"""From documents to token ids: texts piece by piece, chats and pairs with a loss mask, and the tokens that end an answer."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from modelwright.core.data.chats import RefusedChat, Rendered, Renderer, special_texts
from modelwright.core.data.read import Chat, Document, Ids, Pair, Preference, Text, messages_of
from modelwright.core.errors import UserError

Kind = Literal["causal", "masked", "pairs", "ranked"]  # decoder, masked language model, encoder-decoder, reward model
_CHARACTERS, _DOCUMENTS = 1 << 20, 1000  # of a batch
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@dataclass
class Encoded:
    """One document or piece: ids (n,), which are learnt (n,) bool, and bytes of text."""

    ids: np.ndarray
    learnt: np.ndarray | None = None
    bytes: int = 0


class Encoder:
    """Documents to token ids by one tokenizer, for one kind of model."""

    def __init__(self, tokenizer: Any, kind: Kind = "causal", alpaca: bool = False):
        self.tokenizer, self.kind, self.alpaca = tokenizer, kind, alpaca
        self.counts: dict[str, int] = {}
        self.stops: list[int] = []
        self.prefix: list[int] = []
        self.end: int | None = None
        if tokenizer is None:
            return
        self.end = tokenizer.eos_token_id if kind != "masked" or tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if self.end is None and kind == "ranked":
            self.end = tokenizer.sep_token_id
        around, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        if kind != "masked" and bare:
            self.prefix = around[: next((i for i in range(len(around)) if around[i : i + len(bare)] == bare), 0)]
        self.special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._control = special_texts(tokenizer)
        self._line = self._plain(["\n"])[0]

    def count(self, what: str, n: int = 1) -> None:
        if n:
            self.counts[what] = self.counts.get(what, 0) + n

    # ---- texts ---------------------------------------------------------------------------------------------------------
    def running(self, source: Iterable[tuple[int, Document]], refuse: Any) -> Iterator[Encoded]:
        """Running text, piece by piece; the end token follows each document."""
        last: int | None = None
        for batch in _batches(source):
            found = self._pieces(batch, refuse)
            for document, ids in found:
                begins = not isinstance(document, Text) or document.begins
                if begins:
                    if last is not None and self.end is not None and last != self.end:
                        yield Encoded(np.asarray([self.end]))
                    self.count("documents")
                    if isinstance(document, Text) and self.prefix:
                        yield Encoded(np.asarray(self.prefix))
                if len(ids):
                    last = int(ids[-1])
                    yield Encoded(ids, None, len(document.text.encode()) if isinstance(document, Text) else 0)
        if last is not None and self.end is not None and last != self.end:
            yield Encoded(np.asarray([self.end]))

    def _pieces(self, batch: list[tuple[int, Document]], refuse: Any) -> list[tuple[Document, np.ndarray]]:
        texts = [(i, d.text if d.begins else "\n" + d.text) for i, (_, d) in enumerate(batch) if isinstance(d, Text)]
        if texts and self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "the data is text", "add tokenizer files, or give a column of token ids")
        bad = {i for i, t in texts if not _is_unicode(t)}
        for i in sorted(bad):
            refuse(batch[i][0], "its text holds half of a surrogate pair, which is no character")
        texts = [(i, t) for i, t in texts if i not in bad]
        encoded = dict(zip([i for i, _ in texts], self._plain([t for _, t in texts]), strict=True)) if texts else {}
        found: list[tuple[Document, np.ndarray]] = []
        for i, (number, d) in enumerate(batch):
            if isinstance(d, Ids):
                found.append((d, np.asarray(d.ids, np.int64)))
            elif isinstance(d, Text) and i in encoded:
                ids = encoded[i]
                if not d.begins:  # encoded behind a line end, so that no tokenizer takes it for the beginning of a text
                    if ids[: len(self._line)].tolist() != self._line.tolist():
                        raise UserError(f"row {number} cannot be read in pieces", "this tokenizer joins lines", "split the file into rows")
                    ids = ids[len(self._line) :]
                found.append((d, ids))
        return found

    def _plain(self, texts: list[str]) -> list[np.ndarray]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [np.asarray(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        backend.no_truncation()
        backend.no_padding()
        with _parallel_tokenizers():
            return [np.asarray(e.ids, np.int32) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    # ---- chats and pairs -----------------------------------------------------------------------------------------------
    def documents(self, source: Iterable[tuple[int, Document]], refuse: Any) -> Iterator[Encoded]:
        """Chats and pairs, each with its loss mask; rows without a learnt token are left out and counted."""
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "chats and pairs are text", "add tokenizer files")
        chats = self.kind == "causal" and bool(getattr(self.tokenizer, "chat_template", None))
        renderer = Renderer(self.tokenizer) if chats else None
        for batch in _batches(source):
            rendered: list[Rendered] = []
            for number, d in batch:
                one = self._rendered(d, renderer, number, refuse)
                if one is not None and not _is_unicode(one.text):
                    refuse(number, "its text holds half of a surrogate pair, which is no character")
                elif one is not None:
                    rendered.append(one)
            yield from self._masked(rendered, renderer)

    def _rendered(self, d: Document, renderer: Renderer | None, number: int, refuse: Any) -> Rendered | None:
        if isinstance(d, Pair) and renderer is None:
            prompt = _ALPACA.format(d.prompt) if self.alpaca and self.kind == "causal" else d.prompt
            return Rendered(prompt + d.completion, [(len(prompt), len(prompt + d.completion))])
        if isinstance(d, Pair):
            d = Chat([{"role": "user", "content": d.prompt}, {"role": "assistant", "content": d.completion}])
        if renderer is None:
            Renderer(self.tokenizer)  # says what is missing
            raise UserError("a model with an encoder learns from pairs", "the data holds chats", "give prompt and completion columns")
        if not isinstance(d, Chat):
            raise UserError(
                "the data holds two answers to each prompt", "this way to tune learns from one", "use a reward or preference method"
            )
        if self._control:
            self.count("messages with control tokens in their text", sum(bool(self._control.search(str(m["content"]))) for m in d.messages))
        try:
            return renderer.render(d)
        except RefusedChat as error:
            refuse(number, str(error))
            return None

    def _masked(self, rendered: list[Rendered], renderer: Renderer | None) -> Iterator[Encoded]:
        if not rendered:
            return
        if self.kind == "pairs":
            yield from self._two_texts(rendered)
            return
        for one in self._with_masks([(r, renderer) for r in rendered]):
            self.count("documents")
            if one.learnt is None or not one.learnt.any():
                self.count("left out: nothing to learn")
                continue
            yield one

    def _with_masks(self, rendered: list[tuple[Rendered, Renderer | None]]) -> Iterator[Encoded]:
        """Each rendered text as ids with its mask; around one without a template stand the tokenizer's own tokens."""
        for (r, renderer), (ids, offsets) in zip(rendered, self._with_offsets([r.text for r, _ in rendered]), strict=True):
            learnt = np.zeros(len(ids), bool)
            for begin, end in r.spans:
                learnt |= self._span(r.text, ids, offsets, begin, end, renderer)
            if renderer is None:
                ids = np.concatenate([self.prefix, ids, [] if self.end is None else [self.end]]).astype(np.int32)
                learnt = np.concatenate([[False] * len(self.prefix), learnt, [] if self.end is None else [True]]).astype(bool)
            yield Encoded(ids, learnt)

    # ---- two answers to a prompt ---------------------------------------------------------------------------------------
    def preferences(self, source: Iterable[tuple[int, Document]], refuse: Any) -> Iterator[tuple[Encoded, Encoded]]:
        """(chosen, rejected), each the whole text with a mask of its answer; pairs that are equal are left out and counted."""
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "answers are text", "add tokenizer files")
        renderer = Renderer(self.tokenizer) if getattr(self.tokenizer, "chat_template", None) else None
        for batch in _batches(source):
            rendered: list[tuple[Rendered, Renderer | None]] = []
            for number, d in batch:
                try:
                    two = two_answers(d, renderer)
                except RefusedChat as error:
                    refuse(number, str(error))
                    continue
                self.count("documents")
                if two[0][0].text == two[1][0].text:
                    self.count("left out: chosen and rejected are equal")
                elif all(_is_unicode(r.text) for r, _ in two):
                    rendered += two
                else:
                    refuse(number, "its text holds half of a surrogate pair, which is no character")
            ones = list(self._with_masks(rendered)) if rendered else []
            for chosen, rejected in zip(ones[::2], ones[1::2], strict=True):
                assert chosen.learnt is not None and rejected.learnt is not None
                if chosen.learnt.any() and rejected.learnt.any():
                    yield chosen, rejected
                else:
                    self.count("left out: an answer is empty")

    def _two_texts(self, rendered: list[Rendered]) -> Iterator[Encoded]:
        """An encoder and a decoder read their texts apart: each is tokenised for itself, with what the tokenizer puts around a text."""
        cuts = [(r.text, r.spans[0][0]) for r in rendered]
        given, answers = self._plain([t[:at] for t, at in cuts]), self._plain([t[at:] for t, at in cuts])
        for before, answer in zip(given, answers, strict=True):
            self.count("documents")
            parts: list[Any] = [self.prefix, before, self.prefix, answer, [] if self.end is None else [self.end]]
            ids = np.concatenate(parts).astype(np.int32)
            yield Encoded(ids, np.arange(len(ids)) >= len(self.prefix) + len(before))

    def _span(self, text: str, ids: np.ndarray, offsets: np.ndarray, begin: int, end: int, renderer: Renderer | None) -> np.ndarray:
        """Which tokens a span of characters covers, with the special token that ends it."""
        starts, stops = offsets[:, 0], offsets[:, 1]
        inside = (stops > begin) & (starts < end) & (stops > starts)
        inside &= (starts >= begin) | np.asarray([not text[s:begin].strip() for s in starts])
        if renderer is None:
            return inside
        if not inside.any():
            self.count("empty answers, not learnt")
            return inside
        last = int(np.flatnonzero(inside)[-1])
        if int(ids[last]) not in self.special and not renderer.marked:
            after = last + 1
            while after < len(ids) and not text[stops[last] : stops[after]].strip():  # white space before the end token
                after += 1
            if after < len(ids) and int(ids[after]) in self.special and not text[end : starts[after]].strip():
                inside[last : after + 1] = True
                last = after
        if int(ids[last]) in self.special:
            if int(ids[last]) not in self.stops:
                self.stops.append(int(ids[last]))
        else:
            self.count("answers without an end token")
        return inside

    def _with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "the tokenizer is a slow one", "it does not tell where its tokens stand in the text", "save it as tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        with _parallel_tokenizers():
            found = backend.encode_batch(texts, add_special_tokens=False)
        return [(np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in found]


def two_answers(d: Document, renderer: Renderer | None) -> list[tuple[Rendered, Renderer | None]]:
    """The chosen and the rejected answer, each behind the prompt, and by which template. Raises RefusedChat.

    Texts that hold their prompt themselves (HH-RLHF) are parted at the last "Assistant:" that both share, or where they begin to differ.
    """
    if not isinstance(d, Preference):
        raise UserError("the data holds no pairs of answers", "ranked pairs are needed", "give the columns chosen and rejected")
    if isinstance(d.chosen, str) != isinstance(d.rejected, str):
        raise RefusedChat("one of its answers is text and the other messages")
    if isinstance(d.chosen, str) and not d.prompt:
        at = shared_prompt(d.chosen, d.rejected)
        return [(Rendered(t, [(at, len(t))]), None) for t in (d.chosen, d.rejected)]
    if isinstance(d.chosen, str) and isinstance(d.prompt, str) and renderer is None:
        return [(Rendered(d.prompt + t, [(len(d.prompt), len(d.prompt + t))]), None) for t in (d.chosen, d.rejected)]
    try:
        before = messages_of(d.prompt or [])
        both = [[{"role": "assistant", "content": a}] if isinstance(a, str) else messages_of(a) for a in (d.chosen, d.rejected)]
    except ValueError as error:
        raise RefusedChat(str(error)) from None
    if not all(both) or both[0][:-1] != both[1][:-1]:
        raise RefusedChat("its two conversations differ before the last answer")
    if any(b[-1]["role"] != "assistant" for b in both):
        raise RefusedChat("its last message is not the assistant's")
    if renderer is None:
        raise UserError("the tokenizer has no chat template", "the data holds chats", "give data.chat_template (a file, turns or chatml)")
    found: list[tuple[Rendered, Renderer | None]] = []
    for b in both:
        r = renderer.render(Chat([*before, *b]))
        found.append((Rendered(r.text, r.spans[-1:]), renderer))
    return found


def shared_prompt(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their prompt."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    mark = "\n\nAssistant:"
    at = chosen.rfind(mark, 0, same)
    if at >= 0:
        return at + len(mark)
    return chosen.rfind(" ", 0, same) + 1


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Let the tokenizer use its threads; they are kept off elsewhere because processes are forked."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _batches(source: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    size = 0
    for number, d in source:
        batch.append((number, d))
        size += len(d.text) if isinstance(d, Text) else 1000
        if size >= _CHARACTERS or len(batch) >= _DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
