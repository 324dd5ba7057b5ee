"""The final answer of a reasoning chain, and what a way to choose among chains gives back.

The rules are those of AoR's published metrics: what follows the last "the answer is"; of that the last number, the last
letter A to E, or the last yes or no; numbers are equal within a relative 1e-5. Ours: the words are found in any case; a
number is read as a person reads it and written in one way before votes are counted (see chains/numerals.py; published: the
last run of digits); a choice is a letter that stands alone (published: any letter A to E, even within a word). `official=True`
reads numbers and choices as published. `letters`, for concatenated letters, keeps a to z of what follows; an accented letter
falls away on both sides, as in the numbers that people quote for these chains.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from modelwright.judge.chains.numerals import close, last_number, spelled

Kind = Literal["number", "choice", "yes_no", "letters", "text"]
_SPLIT = re.compile(r"answer is", re.I)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ALONE = re.compile(r"\(([A-Ea-e])\)|\b([A-E])\b")
_ANY = re.compile(r"[A-E]")
_YES_NO = re.compile(r"\b(yes|no)\b")
_LETTERS = re.compile(r"[^a-z]")


@dataclass(frozen=True)
class Choice:
    """The answer chosen for a question, the chains that it took, the judge's calls, and what happened on the way."""

    answer: str
    chains: int
    calls: int = 0
    status: str = "ok"  # anything else is why there was no proper choice
    margin: float | None = None


def extract(text: str, kind: Kind, official: bool = False) -> str:
    """The final answer in a chain; empty where there is none."""
    tail = _SPLIT.split(text)[-1].strip()
    if kind == "number":
        if not official:
            return last_number(tail)
        found = _NUMBER.findall(tail.replace(",", ""))
        return spelled(Decimal(found[-1])) if found else ""
    if kind == "choice":
        letters = _ANY.findall(tail.upper()) if official else [a or b for a, b in _ALONE.findall(tail)]
        return letters[-1].upper() if letters else ""
    if kind == "yes_no":
        found = _YES_NO.findall(tail.lower())
        return found[-1] if found else ""
    return _LETTERS.sub("", tail.lower()) if kind == "letters" else tail.rstrip(". ")


def same(answer: str, truth: str, kind: Kind) -> bool:
    """Whether two extracted answers are the same; an empty one is like none."""
    if kind == "number" and answer and truth:
        return close(answer, truth)
    return bool(answer) and answer == truth
