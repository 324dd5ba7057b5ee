"""Verdicts: reading them off a judge's text, mapping them between the two orders, and what they are worth.

A verdict is 1 or 2, the output that is better in the order of the data, or 0: unparsed. LLMBar (2310.07641) judges every
pair in both orders. Its accuracy is the mean over both, its agreement the share of pairs with the same verdict in both; an
unparsed verdict is wrong. In the published figures two unparsed verdicts agree (`official=True`); ours is that a pair without
a verdict in both orders does not. The paper's averages over subsets are plain means, whatever the sizes.

The published code takes the first pattern that it finds anywhere, (a) before (b), so a text that names both counts for (a);
its full stop is a wildcard. Ours is strict: a text that says both is unparsed. `official=True` reads as the published code
does, which is what recorded runs are recomputed with. The published kappas turn every "2" into 0 and are not computed.
"""

import math
import re
from typing import Any, Literal, TypedDict

import numpy as np

from modelwright.core.numbers.stats import mcnemar, wilson

Form = Literal["direct", "explained"]
UNPARSED = 0
_OFFICIAL = {
    "direct": (re.compile(r"(?:^|\n) ?Output \(a\)"), re.compile(r"(?:^|\n) ?Output \(b\)")),
    "explained": (re.compile(r"Output \(a\) is better."), re.compile(r"Output \(b\) is better.")),
}
_LINE = re.compile(r"^\W*(?:output\s*)?\(?([ab])\)?(?:\s+is\s+(?:the\s+)?better)?[\W_]*$", re.I)
_OPENS = re.compile(r"^[\s*_#>\"'`-]*output\s*\(([ab])\)", re.I | re.M)
_NAMES = re.compile(r"\boutput\s*\(([ab])\)", re.I)
_SAYS = re.compile(r"\boutput\s*\(?([ab])\)?\W{0,4}\s*is\s+(?:\w+\s+)?better\b", re.I)
_RATING = re.compile(r"\W*(?:rating|score)?\W*(\d)(?:\s*/\s*9)?[\W_]*", re.I)


def parse_verdict(text: str, form: Form, official: bool = False) -> int:
    """1 when the text says that the output shown first is better, 2 for the second, 0 when it does not say."""
    text = text.strip()
    if official:
        for i, pattern in enumerate(_OFFICIAL[form], 1):
            if pattern.search(text):
                return i
        return UNPARSED
    if form == "direct":
        first = text.split("\n", 1)[0]
        found = _LINE.findall(first) + _OPENS.findall(text)
        said = {m.lower() for m in found and found + _NAMES.findall(first)}
    else:
        said = {m.lower() for m in _SAYS.findall(text)}
        if len(said) > 1:  # what it ends with stands, if that is one thing
            said = {m.lower() for m in _SAYS.findall(text.rsplit("\n", 1)[-1])}
    return "ab".index(said.pop()) + 1 if len(said) == 1 else UNPARSED


def parse_rating(text: str) -> int | None:
    """A rating from 0 to 9 that stands alone on the first line."""
    found = _RATING.fullmatch(text.strip().split("\n", 1)[0])
    return int(found[1]) if found else None


def compare_ratings(first: str, second: str, official: bool = False) -> tuple[int, int]:
    """The verdicts in both orders from two ratings. A tie is 2 and then 1, half right, as published; a rating that does not
    parse leaves both orders unparsed (published: 1 and then 2, half right)."""
    if official:
        try:
            a, b = int(first), int(second)
        except ValueError:
            return 1, 2
    else:
        x, y = parse_rating(first), parse_rating(second)
        if x is None or y is None:
            return UNPARSED, UNPARSED
        a, b = x, y
    return (1 if a > b else 2), (2 if b > a else 1)


def swap(verdicts: Any) -> Any:
    """Verdicts of the other order: 1 and 2 change places, unparsed stays. Its own inverse."""
    return np.where(np.equal(verdicts, UNPARSED), UNPARSED, 3 - np.asarray(verdicts))


def swap_names(text: str) -> str:
    """An explanation as it reads when the outputs change places. Its own inverse."""
    return re.sub(r"(?<=[Oo]utput \()[ab](?=\))", lambda m: "ba"["ab".index(m[0])], text)


class ByPlace(TypedDict):
    """Percent of the pairs whose place alone decided: both orders chose what was shown first, or second."""

    first: float
    second: float


class Measured(TypedDict):
    """What the verdicts on n pairs are worth, in percent. Intervals are Wilson's, 95 %."""

    n: int
    accuracy: float
    accuracy_interval: list[float]
    agreement: float
    agreement_interval: list[float]
    unparsed: float  # of the verdicts
    by_place: ByPlace


def measure(verdicts: np.ndarray, labels: np.ndarray, official: bool = False) -> Measured:
    """Accuracy, agreement and what decided, from verdicts (2, N), both orders in the order of the data, and labels (N,).

    Intervals are over pairs, a pair right in one order counting half. official: two unparsed verdicts agree.
    """
    n = len(labels)
    right, same = verdicts == labels, verdicts[0] == verdicts[1]
    if not official:
        same &= verdicts[0] != UNPARSED
    shown = np.array([[1], [2]])  # the output that each order shows first

    def percent(hits: Any, interval: bool = False) -> Any:
        return [100 * v for v in wilson(float(hits), n)] if interval else 100 * float(hits) / n

    return {
        "n": n,
        "accuracy": 100 * float(right.sum()) / (2 * n),
        "accuracy_interval": percent(right.sum() / 2, True),
        "agreement": percent(same.sum()),
        "agreement_interval": percent(same.sum(), True),
        "unparsed": 100 * float((verdicts == UNPARSED).sum()) / (2 * n),
        "by_place": {"first": percent((verdicts == shown).all(0).sum()), "second": percent((verdicts == swap(shown)).all(0).sum())},
    }


def mean_interval(parts: list[Measured]) -> list[float]:
    """The interval of the plain mean of the parts' accuracies, from theirs: distances to each end are added as squares (MOVER,
    Zou and Donner 2008). Of one part it is that part's own."""
    mean = sum(p["accuracy"] for p in parts) / len(parts)
    below = math.hypot(*(p["accuracy"] - p["accuracy_interval"][0] for p in parts)) / len(parts)
    above = math.hypot(*(p["accuracy_interval"][1] - p["accuracy"] for p in parts)) / len(parts)
    return [mean - below, mean + above]


def differ(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float:
    """p of McNemar's exact test between two judges' verdicts (2, N) on the same pairs: does one get pairs better as often as the
    other? The two orders of a pair are no independent trials, so a pair is one trial, marked 0, half or 1."""
    x, y = (a == labels).sum(0), (b == labels).sum(0)
    return mcnemar(x > y, y > x)
