"""Traces: what a reward model writes about an answer. Thoughts, calls of tools, what the tools said, and the rationale.

As text, with three tokens of their own that tell the parts apart (Themis, 2310.01045):
    <start_tool> Thought: ...\\nAction: name\\nAction Input: text\\n<start_observation> Observation: ...\\n      (for each call)
    <start_work> Work: rationale
A trace without a call has `Thought: Do I need to use a tool? No\\nFinished.` behind <start_tool>.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

TOOL, OBSERVATION, WORK = "<start_tool>", "<start_observation>", "<start_work>"
NO_TOOL = "Thought: Do I need to use a tool? No\nFinished."
Part = Literal["prompt", "tool", "observation", "rationale"]
_CALL = re.compile(r"Thought: (.*?)\nAction: (.*?)\nAction Input: (.*?)\nObservation: (.*?)(?=\nThought: |\Z)", re.DOTALL)
_WRITTEN = re.compile(r" ?Thought: (.*?)\nAction: (.*?)\nAction Input: (.*?)\n?\Z", re.DOTALL)
_ASKED = re.compile(r"Action: (.*?)\nAction Input: (.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call of a tool and what it said."""

    thought: str
    action: str
    input: str
    observation: str

    def text(self) -> str:
        return f"Thought: {self.thought}\nAction: {self.action}\nAction Input: {self.input}\nObservation: {self.observation}"


@dataclass(frozen=True)
class Trace:
    """Calls in order, what is thought after the last of them (`closing`, with its line break), and the rationale."""

    calls: tuple[Call, ...] = ()
    closing: str = ""
    rationale: str = ""

    def actions(self) -> str:
        """Calls and closing as TARA stores them."""
        return "\n".join(c.text() for c in self.calls) + self.closing

    def parts(self) -> list[tuple[Part, str]]:
        """The text that is learnt, in pieces of one kind each; joined they are the whole."""
        found: list[tuple[Part, str]] = []
        for c in self.calls:
            found.append(("tool", f"{TOOL} Thought: {c.thought}\nAction: {c.action}\nAction Input: {c.input}\n{OBSERVATION}"))
            found.append(("observation", f" Observation: {c.observation}\n"))
        if self.closing.strip():
            found.append(("tool", f"{TOOL} {self.closing.strip()}\n"))
        return [*found, ("rationale", f"{WORK} Work: {self.rationale}")]

    def text(self) -> str:
        return "".join(t for _, t in self.parts())


def parse_actions(text: str) -> Trace:
    """Calls and closing of a text as TARA stores it."""
    calls: list[Call] = []
    end = 0
    for m in _CALL.finditer(text):
        if m.start() != end + bool(calls):  # what stands between two calls belongs to none
            break
        calls.append(Call(*m.groups()))
        end = m.end()
    return Trace(tuple(calls), text[end:])


def parse(text: str) -> Trace:
    """A trace from its text. ValueError where it is none."""
    before, mark, work = text.partition(WORK)
    if not mark:
        raise ValueError(f"the trace has no {WORK}")
    calls: list[Call] = []
    closing = ""
    for piece in before.split(TOOL)[1:]:
        asked, seen, said = piece.partition(OBSERVATION)
        if not seen:
            closing = piece.strip()
            continue
        m = _WRITTEN.match(asked)
        if m is None:
            raise ValueError("a call has no Thought, Action and Action Input")
        calls.append(Call(*m.groups(), said.removeprefix(" ").removeprefix("Observation: ").removesuffix("\n")))  # type: ignore[call-arg]
    return Trace(tuple(calls), closing, work.strip().removeprefix("Work: "))


def asked_for(text: str) -> tuple[str, str] | None:
    """The tool and its input that a text which stops before an observation asks for."""
    m = _ASKED.search(text.rpartition(TOOL)[2])
    return (m[1].strip(), m[2].strip()) if m else None


@dataclass(frozen=True)
class Judged:
    """An answer and the trace about it."""

    answer: str
    trace: Trace


@dataclass(frozen=True)
class TracedPair:
    """A question with a good and a bad answer. `tests` grade answers that are code."""

    question: str
    chosen: Judged
    rejected: Judged
    context: str = ""
    id: str = ""
    tests: tuple[str, ...] = ()


def prompt_of(question: str, answer: str, context: str = "") -> str:
    """What stands before a trace."""
    before = f"Context: {context}\n" if context else ""
    return f"### USER:\n{before}Question: {question}\nAnswer: {answer}\n\n### ASSISTANT:\n"


def pairs_of(rows: Iterable[dict[str, Any]]) -> list[TracedPair]:
    """Pairs in TARA's form: question, pos_answer, neg_answer. ValueError names the row that is none."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            good, bad = (_judged(row[k]) for k in ("pos_answer", "neg_answer"))
            tests = tuple(row.get("test_list") or ())
            found.append(TracedPair(row["question"], good, bad, str(row.get("context") or ""), str(row.get("id", number)), tests))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"row {number} is no traced pair: {type(error).__name__} {error}") from None
    return found


def _judged(said: dict[str, Any]) -> Judged:
    actions = said["actions"]
    if isinstance(actions, str):
        trace = parse_actions(actions)
    else:
        trace = Trace((Call(*(str(actions[k]) for k in ("Thought", "Action", "Action Input", "Observation"))),))
    return Judged(said["answer"], Trace(trace.calls, trace.closing, str(said["score_agent"]["explanation"])))
