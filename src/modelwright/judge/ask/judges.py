"""The judge protocol: prompts in, answers out, from a local model, an endpoint or a file of recorded answers.

A judge yields (index, answer) as answers come, in any order, so that each is on disk before the next is waited for.
Nothing is lost: a request that fails for good is an answer too, with the kind of its failure for a status.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors
from modelwright.core.job import Job
from modelwright.core.report.progress import Tick

ANSWERED = ("ok", "cut", "empty")  # cut: at max_tokens. Any other status is the kind of a failure.


@dataclass(frozen=True)
class Prompt:
    """One request. `options` are texts to choose among: their probabilities as the next words are wanted too, or alone where
    `max_tokens` is 0. `attempt` tells apart requests that are the same in all else, where the judge samples."""

    messages: tuple[tuple[str, str], ...]  # (role, text); roles: system, user, assistant
    max_tokens: int = 50
    temperature: float = 0.0
    options: tuple[str, ...] = ()
    attempt: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. `probabilities` are those of the prompt's options, summing to one; `troubles` the failures on the way."""

    text: str = ""
    status: str = "ok"
    probabilities: tuple[float, ...] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    troubles: tuple[str, ...] = ()
    reused: bool = False
    said: str = ""  # by a failure

    @property
    def failed(self) -> bool:
        return self.status not in ANSWERED


class Judge(Protocol):
    """Anything that answers prompts. `name` says what it is, to the last weight: it is part of what answers are kept under."""

    name: str

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]: ...


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


class Desk:
    """Asks a judge for whole lists, and counts: requests, answers by status, failures on the way, tokens, cost."""

    def __init__(self, judge: Judge, tick: Tick | None = None):
        self.judge, self.tick = judge, tick or Tick()
        self.statuses: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        self.said: dict[str, str] = {}
        self.reused = self.tokens_in = self.tokens_out = 0
        self.cost = 0.0

    def __call__(self, prompts: Iterable[Prompt]) -> list[Answer]:
        prompts = list(prompts)
        answers: dict[int, Answer] = {}
        for i, answer in self.judge.ask(prompts):
            answers[i] = answer
            self._count(answer)
        for i in range(len(prompts)):
            if i not in answers:  # a judge that forgot one
                self._count(answers.setdefault(i, Answer(status="not answered")))
        return [answers[i] for i in range(len(prompts))]

    def _count(self, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        self.troubles.update(answer.troubles)
        if answer.said:
            self.said.setdefault(answer.status, answer.said)
        self.reused += answer.reused
        if not answer.reused:
            self.tokens_in += answer.tokens_in
            self.tokens_out += answer.tokens_out
        self.cost += answer.cost
        self.tick(1)

    def plain(self) -> dict[str, Any]:
        """The counts, for json."""
        failed = {k: v for k, v in self.statuses.items() if k not in ANSWERED}
        return {
            "judge": self.judge.name,
            "requests": sum(self.statuses.values()),
            "answers": {k: self.statuses[k] for k in ANSWERED if self.statuses[k]},
            "reused": self.reused,
            "failed": failed,
            "failures_say": self.said,
            "troubles_on_the_way": dict(self.troubles),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "cost": round(self.cost, 6),
        }


def failures(counts: dict[str, Any]) -> list[dict[str, Any]]:
    """A table of what went wrong, from a desk's counts; none where nothing did."""
    met, lost, said = (counts.get(k, {}) for k in ("troubles_on_the_way", "failed", "failures_say"))
    rows = [[kind, met.get(kind, lost.get(kind, 0)), lost.get(kind, 0), said.get(kind, "")[:60]] for kind in lost | met]
    return [{"title": "Failures", "columns": ["kind", "met", "given up", "said"], "rows": rows}] if rows else []


def open_judge(job: Job, url: str | None, model: str | None, endpoint: dict[str, Any], cache: str | None, batch: int) -> Kept:
    """The judge that a step's settings name: an endpoint, else the checkpoint under way; its answers kept in `cache`, else in
    the step's folder. Raises UserError when neither is given, and for what the endpoint's settings lack."""
    file = Path(cache) if cache else job.folder / "answers.jsonl"
    if url:
        from modelwright.judge.ask.endpoint import open_endpoint

        return Kept(open_endpoint(url, model, endpoint), file)
    if job.source is None:
        raise UserError("no judge was given", how="give a checkpoint with --base, or --url and --model of an endpoint")
    from modelwright.judge.ask.local import Local

    return Kept(Local(job.source, batch=batch, seed=job.seed), file)
