"""Right or wrong: graders for numbers, choices and code. Several ways to read an answer are tried in order; the one that fitted is named.

A student that is called wrong because its answer was read badly costs twice: an instructor is paid for it, and the student is taught
what it knows. So an answer is wrong only where every way to read it fails. `official=True` is the published grader alone.
"""

import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from modelwright.core import sandbox
from modelwright.curate.generators.fuzzy import nearest

Kind = Literal["number", "choice", "code"]
LETTERS = "ABCD"
_NUMBER = re.compile(r"([+-])?(?=([0-9]|\.[0-9]))(0|([1-9](\d{0,2}(,\d{3})*)|\d*))?(\.\d*)?(?=\D|$)")
_MARKED = re.compile(r"(?:####|answer is:?|\\boxed\{)\s*[$€£]?\s*(-?[\d,]*\.?\d+)", re.I)
_CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:(?:[Cc]hoose)|(?:(?:[Aa]nswer|[Cc]hoice)(?![^ABCD]{0,20}?(?:n't|not))[^ABCD]{0,10}?\b(?:|is|:|be))\b)[^ABCD]{0,20}?\b(A|B|C|D)\b",
        r"\b(A|B|C|D)\b(?![^ABCD]{0,8}?(?:n't|not)[^ABCD]{0,5}?(?:correct|right))[^ABCD]{0,10}?\b(?:correct|right)\b",
        r"^(A|B|C|D)(?:\.|,|:|$)",
        r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])",
    )
)
_FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.S | re.I)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.M)


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right, the way in which it was read, and what was read."""

    right: bool
    how: str
    said: str = ""


def kind_of(row: dict[str, Any]) -> Kind | None:
    """What a task row asks for, by its columns; None where it is no task."""
    if {"prompt", "test", "entry_point"} <= row.keys():
        return "code"
    if {"question", "answer", *LETTERS} <= row.keys():
        return "choice"
    return "number" if {"question", "answer"} <= row.keys() else None


def grade(kind: Kind, row: dict[str, Any], response: str, official: bool = False) -> Grade:
    """Grade one response to one task."""
    if kind == "number":
        return grade_number(str(row["answer"]), response, official)
    if kind == "choice":
        return grade_choice(str(row["answer"]), [str(row[c]) for c in LETTERS], response, official)
    return grade_code(row, response, official)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def last_number(text: str) -> str:
    """The last number of a text, thousands separators dropped, as the published grader reads it; empty where there is none."""
    found = [m.group() for m in _NUMBER.finditer(text)]
    return found[-1].replace(",", "").replace("+", "").strip() if found else ""


def grade_number(gold: str, response: str, official: bool = False) -> Grade:
    """Equal within 1e-4. Ours looks at the last number first, then at one that the response marks as its answer."""
    truth = last_number(gold)
    read = [("last number", last_number(response))]
    if not official:
        read += [("marked answer", m.replace(",", "")) for m in _MARKED.findall(response)[-1:]]
    for how, said in read:
        if _equal(truth, said):
            return Grade(True, how, said)
    return Grade(False, "last number" if read[0][1] else "no number", read[0][1])


def _equal(a: str, b: str) -> bool:
    try:
        return math.isclose(float(a), float(b), rel_tol=0, abs_tol=1e-4)
    except ValueError:
        return False


# ---- choices ---------------------------------------------------------------------------------------------------------
def grade_choice(gold: str, options: list[str], response: str, official: bool = False) -> Grade:
    """Four patterns in order, then an option that alone stands in the response word for word (ours), then the nearest option."""
    for i, pattern in enumerate(_CHOICES, 1):
        if found := pattern.search(response):
            return Grade(found[1] == gold, f"pattern {i}", found[1])
    if not official:
        text = f" {_bare(response)} "
        inside = [c for c, option in zip(LETTERS, options, strict=True) if _bare(option) and f" {_bare(option)} " in text]
        if len(inside) == 1:
            return Grade(inside[0] == gold, "option's words", inside[0])
    said = LETTERS[nearest(response, options)]
    return Grade(said == gold, "nearest option", said)


def _bare(text: str) -> str:
    return " ".join(re.sub(r"[^\w.]+", " ", text.lower()).split()).strip(". ")


# ---- code ------------------------------------------------------------------------------------------------------------
def blocks(text: str) -> list[str]:
    """The fenced blocks of code in a text, the last one also where its fence is not closed."""
    return [block for block in _FENCE.findall(text) if block.strip()]


def readings(row: dict[str, Any], response: str, official: bool = False) -> Iterator[tuple[str, str]]:
    """Ways to read a program out of a response, in order: (how, program).

    Published: what follows the first `def` completes the prompt, so that imports and helper functions before it are lost.
    """
    name, imports = str(row["entry_point"]), "\n".join(_IMPORT.findall(row["prompt"]))
    if completion := row.get("completion") or _completion(response, name):
        yield "completion", row["prompt"] + completion
    if official:
        return
    found = [block for block in blocks(response) if f"def {name}" in block]
    for block in reversed(found):
        yield "block", block
        yield "block with the prompt's imports", f"{imports}\n{block}"
    if found and (functions := _functions(found[-1])):  # without examples that print or assert
        yield "functions of the block", f"{imports}\n{functions}"
    if not found and f"def {name}" in response:
        start = response.index(f"def {name}")
        yield "unfenced function", f"{imports}\n{response[start:]}"


def _completion(response: str, name: str) -> str:
    """What follows the header of the function, as the published code cuts it."""
    text = next((b for b in blocks(response) if f"def {name}" in b), response)
    found = re.search(rf"def\s+{re.escape(name)}\b[^\n]*:[ \t]*\n(.*)", text, re.S)
    return found[1] if found else ""


def _functions(block: str) -> str:
    """The imports, functions, classes and constants of a block; empty where it does not parse."""
    import ast

    try:
        tree = ast.parse(block)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    keep = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return "\n\n".join(ast.unparse(node) for node in tree.body if isinstance(node, keep))


def grade_code(row: dict[str, Any], response: str, official: bool = False) -> Grade:
    """Run the tests on each reading in the sandbox; right where one of them passes."""
    failed = "no code"
    tried: set[str] = set()
    for how, program in readings(row, response, official):
        if program in tried:
            continue
        tried.add(program)
        failed = runs(f"{program}\n{row['test']}\ncheck({row['entry_point']})\n")
        if not failed:
            return Grade(True, how)
    return Grade(False, failed)


@lru_cache(maxsize=4096)  # the published reading of a program is often ours too
def runs(program: str, seconds: float = 5) -> str:
    """Empty where the program comes to its end in the sandbox, else why it does not."""
    end = secrets.token_hex(8)  # what only a program that came to its end prints last
    found = sandbox.run(f"{program}\nprint({end!r})\n", seconds=seconds)
    if found.ok and found.stdout.rstrip().endswith(end):
        return ""
    last = (found.stderr.strip().splitlines() or [""])[-1].partition(":")[0]
    return last if found.reason == "error" and last.isidentifier() else found.reason or "no end"
