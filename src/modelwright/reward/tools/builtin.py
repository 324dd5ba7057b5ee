"""The paper's seven tools: calculator, calendar, code, weather, translation, search and wiki.

Weather, translation, search and wiki answer from what was recorded, from an endpoint that a person names, or, the last two, from a
person's own corpus by BM25 (k1 1.2, b 0.75). No tool reaches the network unless an endpoint is given.
"""

import ast
import json
import math
import operator
import re
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, short
from modelwright.reward.tools.calls import Tool, ToolBox

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_STATED = re.compile(r"<<(.*?)=([^=<>]*)>>")
_BYTES = 1 << 16  # of an endpoint's answer


# ---- calculator --------------------------------------------------------------------------------------------------------
def value_of(expression: str) -> float:
    """The value of an arithmetic expression. ValueError for anything else; nothing of it is run as code."""
    try:
        tree = ast.parse(expression.strip().replace(",", "").replace("$", ""), mode="eval").body
        found = float(_value(tree))
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"'{expression[:80]}' is no arithmetic: {short(error)}") from None
    if not math.isfinite(found):
        raise ValueError(f"'{expression[:80]}' is not finite")
    return found


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError("the power is too large")
        found = _OPERATORS[type(node.op)](left, right)
        if isinstance(found, complex):
            raise ValueError("the result is no real number")
        return found
    raise ValueError("it holds more than numbers and + - * / // % ** ( )")


def calculator(text: str) -> str:
    """A list of <<expression=result>>, each checked at the decimals that its result has, or one expression."""
    stated = _STATED.findall(text)
    if not stated:
        return f"{value_of(text):g}"
    said, wrong = [], 0
    for expression, result in stated:
        try:
            value, told = value_of(expression), value_of(result)
            decimals = len(result.strip().rpartition(".")[2]) if "." in result else 0
            right = math.isclose(round(value, decimals), told, rel_tol=1e-9, abs_tol=10**-decimals * 1e-6)
            shown = f"{round(value, max(decimals, 4)):.12g}"
        except ValueError:
            right, shown = False, "no number"
        wrong += not right
        said.append(f"{expression.strip()} = {shown}" + ("" if right else f", not {result.strip()}"))
    return f"{'All results are right' if not wrong else f'{wrong} of {len(stated)} results are wrong'}: {'; '.join(said)}."


# ---- calendar ----------------------------------------------------------------------------------------------------------
def _dates(text: str, n: int) -> list[str]:
    parts = [p.strip() for p in text.split(",")]
    if len(parts) != n:
        raise ValueError(f"{n} values are needed and {len(parts)} were given")
    return parts


def week_day(text: str) -> str:
    return date.fromisoformat(text.strip()).strftime("%A")


def target_day(text: str) -> str:
    begin, days = _dates(text, 2)
    return (date.fromisoformat(begin) + timedelta(days=int(days))).isoformat()


def day_difference(text: str) -> str:
    a, b = (date.fromisoformat(d) for d in _dates(text, 2))
    return str(abs((a - b).days))


# ---- code --------------------------------------------------------------------------------------------------------------
def pass_rate(code: str, tests: list[str], seconds: float = 5.0) -> str:
    """How many of the tests an answer passes, each in a process without rights (core/sandbox.py)."""
    from modelwright.core import sandbox

    ends = [sandbox.run(f"{code}\n{test}\n", seconds=seconds) for test in tests]
    passed = sum(e.ok for e in ends)
    rate = f"The pass rate is {passed / max(len(tests), 1):.2g}. {passed} of {len(tests)} tests passed."
    failed = next((e for e in ends if not e.ok), None)
    why = (failed.stderr.strip().splitlines() or [failed.reason])[-1] if failed else ""
    return rate + (f" First failure: {why[:200]}." if failed else "")


def code_run(text: str) -> str:
    """Runs code as it is and gives what it prints."""
    from modelwright.core import sandbox

    end = sandbox.run(text)
    last = (end.stderr.strip().splitlines() or [end.reason])[-1] if not end.ok else ""
    return (end.stdout.strip()[:1000] or "It printed nothing.") if end.ok else f"It failed ({end.reason}): {last[:200]}"


# ---- what was recorded, endpoints, corpora -----------------------------------------------------------------------------
def recorded(values: dict[str, Any]) -> Callable[[str], str]:
    """Answers from recorded ones; TARA's translations are objects with `question` and `answer`."""
    known = {str(v["question"]).strip(): str(v["answer"]) for v in values.values() if isinstance(v, dict) and "question" in v}
    known |= {k.strip(): v for k, v in values.items() if isinstance(v, str)}

    def call(text: str) -> str:
        if text.strip() not in known:
            raise LookupError("nothing was recorded for this input")
        return known[text.strip()]

    return call


def endpoint(url: str) -> Callable[[str], str]:
    """GET of a URL that holds {input}; the body is the observation."""
    if "{input}" not in url or not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no endpoint of a tool", "the argument's place is missing", "write https://host/path?q={input}")

    def call(text: str) -> str:
        with urllib.request.urlopen(url.replace("{input}", urllib.parse.quote(text)), timeout=10) as answer:  # noqa: S310 - http(s) alone
            return answer.read(_BYTES).decode("utf-8", "replace").strip()

    return call


class Bm25:
    """The best passage of a corpus for a query."""

    def __init__(self, passages: list[str]):
        if not passages:
            raise UserError("the corpus holds no passage", how="give a text file with a passage a line")
        self.passages = passages
        self._words = [Counter(_words(p)) for p in passages]
        self._sizes = [sum(w.values()) for w in self._words]
        self._mean = sum(self._sizes) / len(passages) or 1.0
        self._in = Counter(w for words in self._words for w in words)

    def scores(self, query: str) -> list[float]:
        """A score of each passage: sum over the query's words of idf * f (k1 + 1) / (f + k1 (1 - b + b size / mean))."""
        n, k1, b = len(self.passages), 1.2, 0.75
        found = [0.0] * n
        for word in set(_words(query)) & self._in.keys():
            idf = math.log(1 + (n - self._in[word] + 0.5) / (self._in[word] + 0.5))
            for i, words in enumerate(self._words):
                if f := words[word]:
                    found[i] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * self._sizes[i] / self._mean))
        return found

    def __call__(self, text: str) -> str:
        scores = self.scores(text)
        best = max(range(len(scores)), key=scores.__getitem__)
        return self.passages[best] if scores[best] > 0 else "Nothing was found."


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def source(where: str | None, name: str) -> Callable[[str], str]:
    """A tool's function from an endpoint, a file of recorded answers (json), or a corpus with a passage a line."""
    if not where:

        def absent(text: str) -> str:
            raise LookupError(f"nothing was given for {name}")

        return absent
    if where.startswith(("http://", "https://")):
        return endpoint(where)
    path = Path(where).expanduser()
    if not path.is_file():
        raise UserError(f"no file at {path}", f"{name} needs recorded answers, a corpus or an endpoint", "check the path")
    if path.suffix == ".json" or path.name.endswith(".json.gz"):
        return recorded(read_json(path))
    return Bm25([line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()])


def read_json(path: Path) -> Any:
    """The content of a json file, zipped or not."""
    import gzip

    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read", short(error), "copy or download it again") from None


def toolbox(
    weather: str | None = None, translation: str | None = None, search: str | None = None, wiki: str | None = None, seconds: float = 20.0
) -> ToolBox:
    """All tools; those without a source say so when they are called."""
    day, query = {"date": "YYYY-MM-DD"}, {"query": "what to look for"}
    return ToolBox(
        [
            Tool(
                "calculator", "checks a list of <<expression=result>>, or computes one expression", {"expressions": "the list"}, calculator
            ),
            Tool("Calendar.week_day", "the day of the week of a date", day, week_day),
            Tool("Calendar.target_day", "the date some days after another", day | {"days": "a whole number"}, target_day),
            Tool("Calendar.day_difference", "the days between two dates", {"first": "YYYY-MM-DD", "second": "YYYY-MM-DD"}, day_difference),
            Tool("code_run", "runs Python without network, writing or other processes", {"code": "the program"}, code_run),
            Tool("history_weather", "the weather of a place on a date", {"place": "a town"} | day, source(weather, "weather")),
            Tool("translate", "a text in English", {"text": "in any language"}, source(translation, "translation")),
            Tool("google_serper", "what a search engine finds", query, source(search, "search")),
            Tool("wiki_search", "the best passage of an encyclopedia", query, source(wiki, "wiki")),
        ],
        seconds,
    )
