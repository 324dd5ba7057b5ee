"""`modelwright chat`: turns with a checkpoint, in the terminal or through a pipe."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from modelwright.cli.output import note, print_json, resumable, say, writable
from modelwright.cli.talk import Messages, Sampling, Speaker
from modelwright.core.errors import UserError


class Printer(TextStreamer):
    """Prints words as they are written, exactly as they are."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(writable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


class Conversation:
    """Turns so far, as messages where the tokenizer has a template, else as one running text."""

    def __init__(self, speaker: Speaker, system: str | None):
        self.speaker, self.system = speaker, system
        self.turns: list[tuple[str, str]] = []
        self.dropped = 0

    def answer(self, line: str, streamer: Any = None) -> str:
        """The answer to a line; the oldest turns are left out where the conversation outgrows the context."""
        ids = self._fitting(line)
        text = self.speaker.text(self.speaker.write(ids, 1, streamer)[0])
        self.turns.append((line, text))
        return text

    def _fitting(self, line: str) -> torch.Tensor:
        context = getattr(self.speaker.model.config.get_text_config(), "max_position_embeddings", None)
        room = context - self.speaker.sampling.max_new_tokens if context else None
        while True:
            ids = self.speaker.ids(self._prompt(line))
            if room is None or ids.shape[1] <= room or not self.turns:
                return ids
            self.turns.pop(0)
            self.dropped += 1

    def _prompt(self, line: str) -> str | Messages:
        if not self.speaker.has_template:
            return "".join(f"{a}\n{b}\n" for a, b in self.turns) + line
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for said, answered in self.turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": line}]


def chat(base: str, system: str | None, sampling: Sampling, as_json: bool) -> None:
    """Read lines until the end of standard input, /exit or Ctrl-D; answer each. /new starts over."""
    terminal = sys.stdin.isatty() and not as_json
    with resumable(False):
        speaker = Speaker(base, sampling)
        if not speaker.has_template:
            if system:
                raise UserError(f"the tokenizer of {base} has no chat template", "a system message was given", "leave --system out")
            note(f"the tokenizer of {base} has no chat template: each line is continued as plain text")
        if terminal:
            say("/new starts over, /exit or Ctrl-D ends.")
        rows = _converse(lambda: Conversation(speaker, system), terminal, as_json)
    if as_json:
        print_json({"base": base, "turns": rows})


def _converse(fresh: Callable[[], Conversation], terminal: bool, as_json: bool) -> list[dict[str, str]]:
    talk, told = fresh(), 0
    rows: list[dict[str, str]] = []
    while True:
        if terminal:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return rows
        if line.strip() == "/new":
            talk, told = fresh(), 0
        elif line.strip():
            printer = None if as_json else Printer(talk.speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
            rows.append({"user": line.rstrip("\n"), "assistant": talk.answer(line.rstrip("\n"), printer)})
            if talk.dropped > told:
                note(f"the context is full: the oldest {talk.dropped} turns are left out")
                told = talk.dropped
