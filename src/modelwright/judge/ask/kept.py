"""Answers on disk: what a judge has said is kept and never paid for twice."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors
from modelwright.judge.ask.protocol import Answer, Judge, Prompt


class Kept:
    """A judge whose answers are kept, in memory and, where `file` is given, as json lines that a later run takes up.

    The same prompt is asked once. Failures are not kept: the next run asks again. A line that a killed run left torn is
    skipped. With no judge behind it, it replays: a prompt without a kept answer fails with the status "not recorded".
    """

    def __init__(self, judge: Judge | None, file: Path | None = None, name: str = ""):
        self.judge, self.file, self.name = judge, file, judge.name if judge else name
        self.torn, self._open_end = 0, False
        self.kept = self._read(file) if file and file.is_file() else {}

    def _read(self, file: Path) -> dict[str, Answer]:
        kept: dict[str, Answer] = {}
        text = file.read_text(encoding="utf-8", errors="replace")
        for line in filter(None, text.split("\n")):
            try:
                row = json.loads(line)
                key, chances = row.pop("key"), row.get("probabilities")
                kept[key] = Answer(**row | {"probabilities": chances and tuple(chances), "reused": True})
            except (ValueError, TypeError, LookupError, AttributeError):
                self.torn += 1
        self._open_end = not text.endswith("\n")
        if not kept and "\n" in text:
            raise UserError(f"{file} holds no kept answers", how="give a file of an earlier run, or one that is not there yet")
        return kept

    def key(self, prompt: Prompt) -> str:
        return hashlib.sha256(json.dumps([self.name, asdict(prompt)]).encode()).hexdigest()[:32]

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        wanted: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            wanted.setdefault(self.key(prompt), []).append(i)
        missing = [key for key in wanted if key not in self.kept]
        for key in wanted.keys() - missing:
            yield from ((i, self.kept[key]) for i in wanted[key])
        if self.judge is None:
            yield from ((i, Answer(status="not recorded")) for key in missing for i in wanted[key])
        elif missing:
            with self._pen() as pen:
                for j, answer in self.judge.ask([prompts[wanted[key][0]] for key in missing]):
                    first, *others = wanted[missing[j]]
                    if not answer.failed:
                        self.kept[missing[j]] = replace(answer, cost=0.0, troubles=(), reused=True)
                        pen({"key": missing[j]} | {k: v for k, v in asdict(answer).items() if v not in (None, (), 0, "", False)})
                    yield first, answer
                    again = replace(answer, cost=0.0, troubles=(), reused=True)
                    yield from ((i, again) for i in others)

    @contextmanager
    def _pen(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Appends rows, each on disk before the next answer is waited for."""
        if self.file is None:
            yield lambda row: None
            return
        with disk_errors(self.file):
            if self.file.is_dir():
                raise UserError(f"{self.file} is a folder", "kept answers are one file", "name a file in it")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            out = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 - closed below
        with out:
            if self._open_end:  # a torn last line must not swallow the next
                out.write("\n")
                self._open_end = False

            def write(row: dict[str, Any]) -> None:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()

            yield write
