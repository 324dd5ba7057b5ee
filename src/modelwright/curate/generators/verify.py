"""Is a generated sample right? Arithmetic is computed again, code is run on its tests in the sandbox, choices are checked for their form.

Empty is the reason of a sample that holds. A choice's truth cannot be computed: only its form and its agreement with itself are.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from modelwright.curate.generators.grade import LETTERS, Kind, blocks, runs
from modelwright.curate.generators.tasks import Sample, final_number, options_of

_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_NUMERAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_OPERAND = rf"[( ]*-?{_NUMERAL}[) ]*"
_FORMULA = re.compile(
    rf"(?<![\w.)*/+-])(?<![*/+x-] )({_OPERAND}(?:[-+*/]{_OPERAND})+)= *(-?{_NUMERAL})(?![\d.]*[\dA-Za-z])(?! *[-+*/(] *\(?\d)"
)
_NOTE = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_TIMES = re.compile(r"(?<=\d) *[x×] *(?=[\d(])")
_PERCENT = re.compile(r"(?<=\d) *%")
_UNITS = re.compile(r"[$€£,%]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_NAMED = re.compile(r"answer is:?\s*\(?([ABCD])\b", re.I)


def wrong_with(kind: Kind, sample: Sample) -> str:
    """Why the sample is not kept; empty where it holds."""
    return {"number": _number, "choice": _choice, "code": _code}[kind](sample)


def equations(text: str) -> list[tuple[str, str]]:
    """(formula, result) of every calculation: of a line's notes <<3*4=12>> where it has some, else of its parts such as 3 * 4 = 12."""
    plain = _TIMES.sub("*", _UNITS.sub("", _PERCENT.sub("*.01", text))).replace("÷", "/").replace("−", "-").replace("–", "-")
    found: list[tuple[str, str]] = []
    for line in plain.splitlines():
        found += _NOTE.findall(line) or [f for f in _FORMULA.findall(line) if f[0].count("(") == f[0].count(")")]
    return [(formula.strip(), result.strip()) for formula, result in found]


def value(formula: str) -> Fraction | None:
    """The value of + - * / and brackets; None for anything else, and for a division by zero."""
    if len(formula) > 200:
        return None
    try:
        return _value(ast.parse(formula.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")


def _number(s: Sample) -> str:
    found = equations(s.answer)
    if not found:
        return "no calculation to check"
    for formula, result in found:
        computed, said = value(formula), value(result)
        if computed is None or said is None:
            return "calculation not understood"
        rounding = 0 if computed.denominator == 1 else Fraction(1, 10 ** len(result.partition(".")[2]))  # up or down
        if computed != said and abs(computed - said) >= rounding:
            return "wrong calculation"
    final = _NUMBER.findall(_UNITS.sub("", final_number(s.answer)))
    if len(final) != 1:
        return "no final number"
    if Fraction(final[0]) not in [value(result) for _, result in found]:
        return "final number is not computed"
    return ""


def _choice(s: Sample) -> str:
    options = options_of(s.question)
    if len({o.lower() for o in options}) < len(LETTERS):
        return "options are alike"
    named = _NAMED.findall(s.answer)
    return "answer contradicts itself" if any(c.upper() != s.answer[0] for c in named) else ""


def _code(s: Sample) -> str:
    program = "\n\n".join(blocks(s.answer))
    names = re.findall(r"^def\s+(\w+)", program, re.M)
    asserts = [line for line in s.tests.splitlines() if line.lstrip().startswith("assert")]
    if not any(name in line for name in names for line in asserts):
        return "tests do not call the function"
    failed = runs(f"{program}\n\n{s.tests}\n")
    return f"tests fail ({failed})" if failed else ""
