"""Recorded reasoning chains: a question, its true answer, and the texts that a model sampled for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from modelwright.core.data.tables import numbers
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.numbers.stats import wilson
from modelwright.judge.ask.records import records
from modelwright.judge.chains.answers import Choice, Kind, extract, same

_LARGEST = 10**300
_NAMES = ("question", "answer", "chains", "scores")
extracted = cache(extract)


@dataclass
class Question:
    """`answer` is the extracted truth; `scores` are one per chain, where the data has them."""

    text: str
    answer: str
    chains: Sequence[str]
    scores: Sequence[float] | None = None

    def extracted(self, kind: Kind) -> list[str]:
        return [extracted(c, kind) for c in self.chains]


def read_chains(file: Path, kind: Kind, columns: dict[str, str], limit: int | None = None, scores: bool = False) -> list[Question]:
    """The questions in a table. Raises UserError for a missing column, a question without chains, a truth without an answer."""
    for name in columns:
        if name not in _NAMES:
            raise UserError(f"unknown key 'columns.{name}'", how=did_you_mean(name, _NAMES))
    rows = records(file)
    lists = [c for c, v in rows[0].items() if isinstance(v, list) and v and all(isinstance(t, str) for t in v)]
    at = {name: columns.get(name, name) for name in _NAMES}
    if "chains" not in columns and "chains" not in rows[0] and len(lists) == 1:
        at["chains"] = lists[0]
    asked = []
    for i, row in enumerate(rows[:limit], 1):
        for name in _NAMES[: 3 + scores]:
            if at[name] not in row:
                raise UserError(
                    f"row {i} of {file} has no '{at[name]}'", f"the {name} of a question is read there", _hint(at[name], name, row)
                )
        chains, truth = row[at["chains"]], extract(str(row[at["answer"]]), kind)
        if not isinstance(chains, list) or not chains or not all(isinstance(c, str) for c in chains):
            raise UserError(f"row {i} of {file} has no chains in '{at['chains']}'", "a list of texts is needed", "fix or drop the row")
        if not truth:
            raise UserError(f"the answer in row {i} of {file} holds no {kind.replace('_', ' or ')}", how="check kind: " + ", ".join(_KINDS))
        marks = _scores(row[at["scores"]], len(chains), at["scores"], f"row {i} of {file}") if scores else None
        asked.append(Question(str(row[at["question"]]), truth, chains, marks))
    return asked


class Measured(TypedDict):
    """What a way to choose reached: percent, and means per question."""

    accuracy: float
    accuracy_interval: list[float]
    chains: float
    calls: float
    no_answer: int


def _scores(values: Any, n: int, name: str, where: str) -> list[float]:
    """One finite number for each of n chains."""
    if not isinstance(values, list):
        raise UserError(f"{where} has no list of scores in '{name}'", f"it holds {repr(values)[:40]}", "give one score for each chain")
    if len(values) != n:
        raise UserError(f"{where} has {len(values)} scores for {n} chains", how="give one for each")
    beyond = [v for v in values if isinstance(v, int) and abs(v) > _LARGEST]
    if beyond:
        raise UserError(f"'{name}' in {where} holds a number beyond 1e300", "a finite number is needed", "fix or drop the row")
    return numbers(values, f"'{name}' in {where}").tolist()


def measure(asked: list[Question], chosen: list[Choice], kind: Kind) -> Measured:
    """Accuracy in percent with Wilson's interval, chains and calls per question, and how many questions got no answer."""
    right, n = sum(same(c.answer, q.answer, kind) for c, q in zip(chosen, asked, strict=True)), len(asked)
    return {
        "accuracy": 100 * right / n,
        "accuracy_interval": [100 * v for v in wilson(right, n)],
        "chains": sum(c.chains for c in chosen) / n,
        "calls": sum(c.calls for c in chosen) / n,
        "no_answer": sum(not c.answer for c in chosen),
    }


def coverage(asked: list[Question], kind: Kind, n: int) -> float:
    """Share of the questions, in percent, whose right answer is among the first n chains."""
    return 100 * sum(any(same(a, q.answer, kind) for a in q.extracted(kind)[:n]) for q in asked) / len(asked)


def table_row(name: str, found: Measured) -> list[Any]:
    """method, accuracy, interval, chains, calls, no answer"""
    low, high = found["accuracy_interval"]
    return [
        name,
        f"{found['accuracy']:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{found['chains']:.2f}",
        f"{found['calls']:.2f}",
        found["no_answer"],
    ]


COLUMNS = ["", "accuracy", "interval", "chains", "calls", "no answer"]
_KINDS = ("number", "choice", "yes_no", "letters", "text")


def _hint(wanted: str, name: str, row: dict) -> str:
    return did_you_mean(wanted, row) or f"name the column: columns: {{{name}: NAME}}"
