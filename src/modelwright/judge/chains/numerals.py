"""The last number in a text, as a person would read it: signs, currencies, fractions, powers, LaTeX.

Published readers (AoR's among them) take the last match of `-?\\d+(\\.\\d+)?`. That reads ".5" as 5, "-$5" as 5, "1/2" as 2 and
"2.9e1" as 1. Here a number may open with its point, carry a minus before or after a currency sign, be a fraction, a mixed
number or a power of ten, and be written in LaTeX. A minus between two operands ("10-5", "2-3 days") is no sign.

Where a number stands in a formula that is not understood, as in 1/e, \\sqrt{2} or 2^x, there is no number: a part of a formula
must not pass for its value. Times (12:30), dates (1/2/2024) and ±5 are no numbers either.
"""

import re
from decimal import Context, Decimal

_CONTEXT = Context(prec=28)  # traps overflow, division by zero and invalid operations
_MOST = 9999  # digits of an exponent's value: beyond it nothing is a sensible answer
_MINUS = dict.fromkeys(map(ord, "−﹣－–—‒"), "-")
_SIGNS = _MINUS | {ord("×"): "*", ord("⋅"): "*", ord("·"): "*", ord("⁄"): "/", ord("∕"): "/", ord("÷"): "/"}
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED_RUN = re.compile(r"(?<=[\w)])[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:text|mbox|textrm)\s*\{[^{}]*\}"), " "),  # a unit
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]"), " "),
    (re.compile(r"\\boxed\s*(?=\{)"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^\s*\{\s*(-?\d+)\s*\}"), r"^\1"),
)
_PLAIN = r"(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
_POWER = r"(?:\s?(?:\^|\*\*)\s?\(?(?P<{0}>[-+]?\d+)\)?)?"
_TOKEN = re.compile(
    r"(?P<none>\d+(?::\d+)+|\d+(?:/\d+){2,})"
    r"|(?P<whole>\d+)\ +(?P<above>\d+)/(?P<below>\d+)(?![\d/])"
    rf"|(?P<base>{_PLAIN})"
    r"(?:[eE](?P<e>[-+]?\d+)(?!\w)|\s?[*xX]\s?10\s?(?:\^|\*\*)\s?\(?(?P<ten>[-+]?\d+)\)?)?"
    + _POWER.format("power")
    + rf"(?:\s?/\s?(?P<under>{_PLAIN}){_POWER.format('under_power')})?"
)
_SIGN = re.compile(r"-( ?)[$€£¥]?( ?)$")
_OPERAND = re.compile(r"[\w)\]}%-]$")  # a minus right after one of these is an operation
_OPENS = re.compile(r"(?:^|[=:(\[{≈~$])$")  # before a minus that stands apart from its number
_BOUNDARY = re.compile(r"[=≈\n$]")  # the expression around a number ends here
_FORMULA = re.compile(r"\\[A-Za-z]|√|π")
_UNKNOWN = re.compile(r"\s?(?:[/^]|\*\*)\s?\(?(?:[A-Za-z]\b|\\)|[π√]")  # 1/e, 2^x, 2π


def last_number(text: str) -> str:
    """The last number of a text in one plain spelling (18, 18.0, $18 and 36/2 are "18"); empty where there is none."""
    text = _plain(text)
    for found in reversed(list(_TOKEN.finditer(text))):
        before = text[: found.start()]
        if found["none"] or before.endswith(("^", "±", "+/-", "\\pm ")):
            continue
        if _in_a_formula(text, found.start(), found.end()):
            return ""
        try:
            value = _value(found)
        except ArithmeticError:
            return ""
        return spelled(-value if _negative(before) else value)
    return ""


def spelled(value: Decimal) -> str:
    """18, -0.5 and 1E+40: without trailing zeros, with an exponent only where the digits would not end."""
    value = _CONTEXT.plus(value).normalize(_CONTEXT)
    if not value:
        return "0"
    return format(value, "f") if abs(value.adjusted()) < 30 else str(value)


def close(a: str, b: str, tolerance: float = 1e-5) -> bool:
    """Whether two numbers are the same within a relative tolerance, however large or small."""
    x, y = Decimal(a), Decimal(b)
    return abs(x - y) <= Decimal(tolerance) * max(abs(x), abs(y))


def _plain(text: str) -> str:
    """Without thousands separators, with one sign for minus, times and divided by, and LaTeX that is understood written out."""
    text = text.replace("{,}", "").replace(",", "").translate(_SIGNS)
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, f" {fraction}")
    text = _RAISED_RUN.sub(lambda run: "^" + run[0].translate(_RAISED), text)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _in_a_formula(text: str, start: int, end: int) -> bool:
    """Whether the number at text[start:end] is part of an expression that is not understood."""
    if _UNKNOWN.match(text, end) or text[:start].endswith("√"):
        return True
    around = _BOUNDARY.split(text[:start])[-1] + _BOUNDARY.split(text[end:])[0]
    return bool(_FORMULA.search(around))


def _value(found: re.Match[str]) -> Decimal:
    """The number of a match, without its sign. Raises ArithmeticError for one beyond all measure."""
    if found["whole"]:
        return _CONTEXT.add(Decimal(found["whole"]), _CONTEXT.divide(Decimal(found["above"]), Decimal(found["below"])))
    value = _raised(Decimal(found["base"]), found["power"])
    value = _CONTEXT.multiply(value, _raised(Decimal(10), found["e"] or found["ten"] or "0"))
    if found["under"]:
        value = _CONTEXT.divide(value, _raised(Decimal(found["under"]), found["under_power"]))
    return value


def _raised(base: Decimal, exponent: str | None) -> Decimal:
    if exponent is None:
        return base
    if len(exponent) > 6 or abs(int(exponent)) > _MOST:
        raise ArithmeticError(exponent)
    return _CONTEXT.power(base, int(exponent))


def _negative(before: str) -> bool:
    """Whether what stands before a number gives it a minus."""
    found = _SIGN.search(before)
    if not found:
        return False
    left = before[: found.start()]
    apart = found[1] or found[2]
    return bool(_OPENS.search(left.rstrip(" "))) if apart else not _OPERAND.search(left)
