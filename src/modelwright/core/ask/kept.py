"""Answers on disk: what a judge has said is kept and never paid for twice."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modelwright.core.ask.protocol import ANSWERED, Answer, Judge, Prompt
from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors

_TYPES: dict[str, Any] = {"text": str, "status": str, "tokens_in": int, "tokens_out": int, "cost": (int, float), "said": str}


class Kept:
    """A judge whose answers are kept, in memory and, where `file` is given, as json lines that a later run takes up.

    The same prompt is asked once. Failures are not kept: the next run asks again. A line that a killed run left torn, that holds
    values of another type, or whose probabilities do not belong to the prompt's options is no answer: it is counted and asked
    again. With no judge behind it, it replays: a prompt without a kept answer fails with the status "not recorded".
    """

    def __init__(self, judge: Judge | None, file: Path | None = None, name: str = ""):
        self.judge, self.file, self.name = judge, file, judge.name if judge else name
        self.torn, self._open_end = 0, False
        self.kept = self._read(file) if file and file.is_file() else {}

    def _read(self, file: Path) -> dict[str, Answer]:
        kept: dict[str, Answer] = {}
        content = file.read_bytes()
        for line in filter(None, content.split(b"\n")):
            try:
                key, answer = _parse(line)
                kept[key] = answer
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                self.torn += 1
        self._open_end = not content.endswith(b"\n")
        if not kept and b"\n" in content:
            raise UserError(f"{file} holds no kept answers", how="give a file of an earlier run, or one that is not there yet")
        return kept

    def key(self, prompt: Prompt) -> str:
        return hashlib.sha256(json.dumps([self.name, asdict(prompt)]).encode()).hexdigest()[:32]

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        wanted: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            wanted.setdefault(self.key(prompt), []).append(i)
        for key, (first, *_) in wanted.items():
            if key in self.kept and not _fits(self.kept[key], prompts[first]):
                del self.kept[key]
                self.torn += 1
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


def _parse(line: bytes) -> tuple[str, Answer]:
    """The key and the answer on a line. Raises ValueError or TypeError for anything else."""
    row = json.loads(line)
    key, chances, troubles = row.pop("key"), row.pop("probabilities", None), row.pop("troubles", ())
    for name, value in row.items():
        if name not in _TYPES or isinstance(value, bool) or not isinstance(value, _TYPES[name]):
            raise TypeError(name)
        if not isinstance(value, str) and not 0 <= value < 1e15:
            raise ValueError(name)
    if not isinstance(key, str) or row.get("status", "ok") not in ANSWERED:
        raise TypeError("key or status")
    if not isinstance(troubles, (list, tuple)):
        raise TypeError("troubles")
    row |= {"cost": 0.0}  # it was paid by the run that asked
    return key, Answer(**row, probabilities=None if chances is None else _shares(chances), reused=True)


def _shares(values: Any) -> tuple[float, ...]:
    """Probabilities: numbers from 0 to 1 that sum to one."""
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError("probabilities")
    if not values or not all(0 <= v <= 1 for v in values) or abs(sum(values) - 1) > 1e-3:
        raise ValueError("probabilities")
    return tuple(map(float, values))


def _fits(answer: Answer, prompt: Prompt) -> bool:
    return answer.probabilities is None or len(answer.probabilities) == len(prompt.options)
