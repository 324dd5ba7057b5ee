"""Tasks of three kinds as texts: what the student is asked, what the instructor is told, and how its samples are read.

The wording is ours. The order is the published one: what the student can do (contrast), what it failed, its wrong answer, the wish.
Samples come in one strict form per kind, which `render` writes and `parse` reads; parse(render(samples)) == samples.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelwright.core.ask.protocol import Prompt
from modelwright.curate.generators.grade import LETTERS, Kind, blocks

Strategy = Literal["le", "lec", "mimic", "random"]
_ROLE = {
    "number": "You are a patient teacher of mathematics who writes exercises.",
    "choice": "You are a patient teacher who writes multiple-choice questions.",
    "code": "You are a patient teacher of Python who writes programming exercises.",
}
_TO_STUDENT = {
    "number": "",
    "choice": "Choose the right answer among A, B, C and D.\n\n",
    "code": "Complete this Python function.\n\n",
}
_RULES = (
    "Each sample is new, clear and complete in itself, is about as difficult as the question shown, and its answer is right. "
    "Where a wrong answer is shown, find what went wrong in it, and write samples that train exactly that."
)
_FORM = {
    "number": (
        "### Question 1\nthe question\n### Answer 1\nthe calculation, step by step, each step as in 3 * 4 = <<3*4=12>>12\n#### the number",
        "similar questions, each with its calculation and its final number",
    ),
    "choice": (
        "### Question 1\nthe question\nA. first option\nB. second option\nC. third option\nD. fourth option\n"
        "### Answer 1\nA. a short explanation",
        "similar questions, each with four different options, the right letter and a short explanation",
    ),
    "code": (
        "### Question 1\nwhat the function does, with its header\n### Answer 1\n```python\nthe whole function, with its imports\n```\n"
        "### Tests 1\n```python\nassert name(argument) == result\n```",
        "similar exercises, each with a whole function and three asserts",
    ),
}
_PART = re.compile(r"^[ \t]*#{2,3}[ \t]*\**(Question|Answer|Tests?)\**[ \t]*(\d+)[ \t]*[:.]?\**[ \t]*$", re.M | re.I)
_OPTION = re.compile(r"^([ABCD])[.)][ \t]*(.+)$", re.M)
_NOTE = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.M)


@dataclass(frozen=True)
class Sample:
    """A task that a model wrote: question, worked answer, and tests where it is code."""

    question: str
    answer: str
    tests: str = ""


# ---- what the student is asked -----------------------------------------------------------------------------------------
def question_of(kind: Kind, row: dict[str, Any]) -> str:
    """The task as a person reads it; for choices with the options."""
    if kind == "choice":
        return "\n".join([str(row["question"]), *(f"{c}. {row[c]}" for c in LETTERS)])
    return str(row["prompt" if kind == "code" else "question"]).rstrip()


def to_student(kind: Kind, question: str, max_tokens: int) -> Prompt:
    """The request to the student: greedy, as published."""
    before = _TO_STUDENT[kind]
    return Prompt((("user", before + question),), max_tokens)


# ---- what the instructor is told -----------------------------------------------------------------------------------------
def samples_per_call(wanted: int, wrong: int) -> int:
    """m = ceil(wanted / wrong) + 1; the one more pays for samples that cannot be read."""
    return -(-wanted // wrong) + 1


def system_of(kind: Kind) -> str:
    return f"{_ROLE[kind]} {_RULES}\n\nWrite each sample in this form, numbered from 1, and nothing else:\n{_FORM[kind][0]}"


def message(kind: Kind, question: str, wrong_answer: str | None, right: Sequence[str], m: int) -> str:
    """The instructor's task: LE without `right`, LEC with it, mimic and random without a wrong answer."""
    parts = []
    if right:
        shown = "\n\n".join(f"[QUESTION]\n{text}" for text in right)
        parts.append(f"The student answers these questions correctly:\n\n{shown}")
    if wrong_answer is None:
        parts.append(f"This is a question:\n\n[QUESTION]\n{question}")
    else:
        parts.append(f"The student fails on this question:\n\n[QUESTION]\n{question}")
        parts.append(f"This is the student's wrong answer:\n\n[WRONG ANSWER]\n{wrong_answer}")
    return "\n\n".join([*parts, f"Write {m} {_FORM[kind][1]}."])


def to_instructor(kind: Kind, text: str, temperature: float, max_tokens: int, attempt: int) -> Prompt:
    return Prompt((("system", system_of(kind)), ("user", text)), max_tokens, temperature, attempt=attempt)


# ---- what the instructor wrote -------------------------------------------------------------------------------------------
def render(kind: Kind, samples: Sequence[Sample]) -> str:
    """Samples in the form that `parse` reads."""
    out = []
    for i, s in enumerate(samples, 1):
        out += [f"### Question {i}", s.question, f"### Answer {i}", s.answer]
        if kind == "code":
            out += [f"### Tests {i}", f"```python\n{s.tests}\n```"]
    return "\n".join(out)


def parse(kind: Kind, text: str) -> tuple[list[Sample], int]:
    """The samples in a reply, and how many of its questions are not whole."""
    marks = list(_PART.finditer(text))
    found: dict[str, dict[str, str]] = {}
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):  # without a mark there is no end
        body = text[mark.end() : end]
        found.setdefault(mark[2], {}).setdefault(mark[1].lower()[:4], body.strip())
    samples = [s for parts in found.values() if (s := _sample(kind, parts))]
    return samples, len(found) - len(samples)


def _sample(kind: Kind, parts: dict[str, str]) -> Sample | None:
    question, answer = parts.get("ques", ""), parts.get("answ", "")
    if not question or not answer:
        return None
    if kind == "number":
        return Sample(question, answer) if _FINAL.search(answer) else None
    if kind == "choice":
        whole = [c for c, _ in _OPTION.findall(question)] == list(LETTERS) and answer[0] in LETTERS and not answer[1:2].isalnum()
        return Sample(question, answer) if whole else None
    tests = blocks(parts.get("test", ""))
    return Sample(question, answer, tests[0].strip()) if blocks(answer) and tests else None


def final_number(answer: str) -> str:
    """What stands after the last ####."""
    found = _FINAL.findall(answer)
    return found[-1] if found else ""


def options_of(question: str) -> list[str]:
    return [text.strip() for _, text in _OPTION.findall(question)]


def trained_on(kind: Kind, s: Sample) -> str:
    """The answer as the student is to write it: a calculation without its notes, and with its answer in a sentence."""
    if kind != "number":
        return s.answer
    return _NOTE.sub("", _FINAL.sub("", s.answer)).rstrip() + f"\nThe answer is {final_number(s.answer)}."
