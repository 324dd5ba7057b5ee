"""Queries that a model makes of seeds: questions for breadth, thoughts for depth; and which of them are not used.

Wording, limits and the list of refusals are ours.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Prompt
from modelwright.core.data.tables import records
from modelwright.core.errors import UserError, did_you_mean
from modelwright.curate.generators.overlap import words
from modelwright.curate.generators.replies import numbered

_REFUSAL = re.compile(r"\b(?:i'?m sorry|i am sorry|sorry,|as an ai|i can(?:no|')t (?:help|assist|answer)|i am unable|i'm unable)", re.I)
_LIST = re.compile(r"^\s*(?:\d+[.):]|[-*•])?\s*(.+\?)\s*$", re.M)
LONGEST = 64  # words of a question
ALIKE = 0.9  # Jaccard similarity of their words from which two queries of a seed are one


@dataclass(frozen=True)
class Query:
    """What is looked for, how it came about, and the place of the seed that it goes back to."""

    text: str
    kind: str  # seed, question or thought
    seed: int
    round: int
    parent: str = ""  # the seed or question that it was made from


@dataclass
class Pool:
    """Queries in the order in which they were made; what is not used, by reason."""

    queries: list[Query] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    seen: dict[tuple[int, str], list[frozenset[str]]] = field(default_factory=dict)
    exact: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, query: Query) -> bool:
        """Whether the query is used."""
        if reason := self.fault(query):
            self.dropped[f"{query.kind}: {reason}"] += 1
            return False
        self.queries.append(query)
        of = words(query.text)
        self.exact.add(of)
        self.seen.setdefault((query.seed, query.kind), []).append(frozenset(of))
        return True

    def fault(self, query: Query) -> str:
        """Why a query is not used; empty where it is."""
        of = words(query.text)
        if not of:
            return "empty"
        if of in self.exact:
            return "repeats a query"
        if query.kind == "seed":
            return ""
        if len(of) < 3:
            return "too short"
        if query.kind == "question" and len(of) > LONGEST:
            return "too long"
        if _REFUSAL.search(query.text[:200]):
            return "refusal"
        mine = frozenset(of)
        alike = any(len(mine & o) >= ALIKE * len(mine | o) for o in self.seen.get((query.seed, query.kind), []))
        return "nearly repeats a query" if alike else ""


def read_seeds(seeds: list[str], file: str, column: str) -> list[tuple[str, str]]:
    """(text, domain) of each seed. A table's column `domain` names the domain; without one the seed is its own."""
    found = [(s.strip(), s.strip()) for s in seeds if s.strip()]
    if file and Path(file).suffix == ".txt":
        if not Path(file).is_file():
            raise UserError(f"no file at {file}", how="check the path")
        found += [(s.strip(), s.strip()) for s in Path(file).read_text(encoding="utf-8").splitlines() if s.strip()]
    elif file:
        for i, row in enumerate(records(Path(file)), 1):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"row {i} of {file} has no text '{column}'", how=did_you_mean(column, list(row)))
            found.append((row[column].strip(), str(row.get("domain") or row[column]).strip()))
    if not found:
        raise UserError("there are no seeds", "the search starts with them", "give seeds: [WORDS, ...] or seed_file: FILE")
    return found


def ask_questions(desk: Desk, parents: list[Query], pool: Pool, settings: Any, round_number: int) -> list[Query]:
    """New questions around each parent, `samples` requests each, added to the pool."""
    asked = [(p, i) for p in parents for i in range(settings.samples)]
    prompts = [_prompt(question_request(p.text, settings.questions), settings, i) for p, i in asked]
    return _added(desk, [p for p, _ in asked], prompts, pool, "question", round_number)


def ask_thoughts(desk: Desk, questions: list[Query], pool: Pool, settings: Any) -> list[Query]:
    """One reasoned answer to each question, added to the pool."""
    prompts = [_prompt(thought_request(q.text), settings, 0) for q in questions]
    return _added(desk, questions, prompts, pool, "thought", questions[0].round if questions else 0)


def question_request(text: str, count: int) -> str:
    return (
        f"Write {count} different questions that somebody who learns about the subject below would look up. Cover its parts. Write each "
        f"under a heading of its own, ### Question 1 and so on, and nothing else.\n\nQuestions about: {text}"
    )


def thought_request(text: str) -> str:
    return (
        "Think step by step about the question below and write down each step with the facts and terms that it needs. Write plain "
        f"sentences.\n\nThoughts about: {text}"
    )


def _prompt(text: str, settings: Any, attempt: int) -> Prompt:
    return Prompt((("user", text),), settings.max_tokens, settings.temperature, attempt=attempt)


def _added(desk: Desk, parents: list[Query], prompts: list[Prompt], pool: Pool, kind: str, round_number: int) -> list[Query]:
    made = []
    for parent, answer in zip(parents, desk(prompts), strict=True):
        if answer.failed:
            pool.dropped[f"{kind}: request failed: {answer.status}"] += 1
            continue
        texts = questions_of(answer.text) if kind == "question" else [answer.text.strip()]
        if not texts:
            pool.dropped["question: no question in the reply"] += 1
        made += [q for t in texts if pool.add(q := Query(t, kind, parent.seed, round_number, parent.text))]
    return made


def questions_of(reply: str) -> list[str]:
    """The questions under their headings; where a model wrote none, the lines that end in a question mark."""
    return [" ".join(t.split()) for t in numbered(reply, "Question")] or [m.strip() for m in _LIST.findall(reply)]
