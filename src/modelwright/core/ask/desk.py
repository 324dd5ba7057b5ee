"""Asking whole lists of prompts, and counting what came back."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Required, TypedDict

from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import ANSWERED, Answer, Judge, Prompt
from modelwright.core.ask.thoughts import without_thoughts
from modelwright.core.report.progress import Tick


class Counts(TypedDict, total=False):
    """What became of the requests, for json. A program as the judge counts its requests only."""

    judge: Required[str]
    requests: Required[int]
    answers: dict[str, int]  # by status
    reused: int
    kept_lines_not_read: int
    failed: dict[str, int]  # given up, by kind
    failures_say: dict[str, str]
    troubles_on_the_way: dict[str, int]  # by kind
    tokens_in: int
    tokens_out: int
    cost: float
    unread_replies: int


class Desk:
    """Asks a judge for whole lists. Answers come without what was thought before them.

    Counts requests, answers by status, failures on the way, tokens and cost.
    """

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
            self._count(answer)
            answers[i] = replace(answer, text=without_thoughts(answer.text))
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

    def plain(self) -> Counts:
        """The counts, for json."""
        failed = {k: v for k, v in self.statuses.items() if k not in ANSWERED}
        return {
            "judge": self.judge.name,
            "requests": sum(self.statuses.values()),
            "answers": {k: self.statuses[k] for k in ANSWERED if self.statuses[k]},
            "reused": self.reused,
            "kept_lines_not_read": self.judge.torn if isinstance(self.judge, Kept) else 0,
            "failed": failed,
            "failures_say": self.said,
            "troubles_on_the_way": dict(self.troubles),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "cost": round(self.cost, 6),
        }


def failures(counts: Counts) -> list[dict[str, Any]]:
    """A table of what went wrong, from a desk's counts; none where nothing did."""
    met, lost, said = counts.get("troubles_on_the_way", {}), counts.get("failed", {}), counts.get("failures_say", {})
    rows = [[kind, met.get(kind, lost.get(kind, 0)), lost.get(kind, 0), said.get(kind, "")[:60]] for kind in lost | met]
    if not rows:
        return []
    return [{"title": "Failures", "columns": ["kind", "met", "given up", "said"], "rows": rows}]
