"""Prompts out of whatever data holds them: a column of prompts, pairs, chats, ranked pairs, token ids.

With a chat template a prompt is a conversation up to where the assistant speaks next; without one it is its text. An answer in the data is
left aside. Prompts that are too long are left out and counted: one that is cut asks for something else.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from modelwright.core.data.chats import RefusedChat
from modelwright.core.data.encode import shared_prompt
from modelwright.core.data.make import in_vocabulary
from modelwright.core.data.read import Chat, Document, Ids, Pair, Preference, Source, Text, messages_of
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError, short
from modelwright.core.knobs import Data


@dataclass
class Prompts:
    """Makes token ids of prompts by one tokenizer."""

    tokenizer: Any
    longest: int  # tokens, at most
    counts: dict[str, Any] = field(default_factory=dict)

    def rows(self, data: Data, vocab: int) -> Rows:
        """Rows of prompts, without a target. UserError where none is left."""
        if not data.path and not data.sources:
            raise UserError("no prompts were given", how="give data: {path: FILE, column: NAME}")
        if data.sources:
            raise UserError("data.sources do not work for prompts", "they are drawn from one source", "give data.path")
        source = Source(data)
        kept: list[list[int]] = []
        for number, document in source:
            try:
                ids = self.ids(document)
            except RefusedChat as error:
                source.refuse(number, str(error))
                continue
            self._count("prompts")
            if len(ids) > self.longest:
                self._count("left out: longer than prompt_tokens")
            elif not ids:
                self._count("left out: empty")
            else:
                kept.append(ids)
        if not kept:
            told = ", ".join(f"{k}: {v}" for k, v in self.counts.items()) or "the file has none"
            raise UserError(f"{data.path} leaves no prompt", told, "raise prompt_tokens, or check the column")
        in_vocabulary(min(map(min, kept)), max(map(max, kept)), vocab)
        return padded(kept, {"format": source.format, **source.counts, **self.counts})

    def ids(self, document: Document) -> list[int]:
        """Token ids of what stands before the answer."""
        if isinstance(document, Ids):
            return document.ids
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "the prompts are text", "add tokenizer files, or give a column of token ids")
        whole = isinstance(document, Preference) and isinstance(document.chosen, str) and not document.prompt  # HH-RLHF: its own turns
        if getattr(self.tokenizer, "chat_template", None) and not whole:
            return list(self.tokenizer(self._rendered(_asked(document)), add_special_tokens=False)["input_ids"])
        text = _text(document)
        around, bare = (self.tokenizer(text, add_special_tokens=s)["input_ids"] for s in (True, False))
        begin = next((i for i in range(len(around)) if around[i : i + len(bare)] == bare), 0)
        return list(around[:begin]) + list(bare)  # what the tokenizer puts after a text would end it

    def _rendered(self, chat: Chat) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: whatever it raises, the chat cannot be rendered
            raise RefusedChat(f"the chat template refuses it: {short(error)}") from None

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _asked(document: Document) -> Chat:
    """The conversation up to the assistant's next turn."""
    if isinstance(document, Preference):
        return Chat(_before(_messages(document)))
    if isinstance(document, Chat):
        return Chat(_before(document.messages), document.tools)
    text = document.prompt if isinstance(document, Pair) else document.text  # type: ignore[union-attr]
    return Chat([{"role": "user", "content": text}])


def _messages(document: Preference) -> list[dict[str, Any]]:
    try:
        if document.prompt:
            return messages_of(document.prompt)
        return messages_of(document.chosen)
    except (ValueError, TypeError, AttributeError) as error:
        raise RefusedChat(short(error)) from None


def _before(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the assistant's last ones."""
    n = len(messages)
    while n and messages[n - 1]["role"] == "assistant":
        n -= 1
    if not n:
        raise RefusedChat("nobody asks the assistant anything")
    return messages[:n]


def _text(document: Document) -> str:
    if isinstance(document, Text):
        return document.text
    if isinstance(document, Pair):
        return document.prompt
    if isinstance(document, Preference) and isinstance(document.prompt, str) and document.prompt:
        return document.prompt
    if isinstance(document, Preference) and isinstance(document.chosen, str) and not document.prompt:
        return document.chosen[: shared_prompt(document.chosen, document.rejected)]
    raise UserError(
        "the tokenizer has no chat template", "the prompts are chats", "give data.chat_template (a file, turns or chatml), or texts"
    )


def padded(ids: list[list[int]], facts: dict[str, Any]) -> Rows:
    """Rows in memory of token ids."""
    width = max(len(i) for i in ids)
    rows = torch.zeros(len(ids), width, dtype=torch.int32)
    for row, one in zip(rows, ids, strict=True):
        row[: len(one)] = torch.tensor(one, dtype=torch.int32)
    return Rows(rows, torch.full_like(rows, IGNORE), torch.tensor([len(i) for i in ids]), facts=facts | {"rows": len(ids)})
