"""The nearest of a few texts, as the published grader found it: thefuzz's `extractOne` with its score WRatio, over difflib.

A score is a whole number from 0 to 100. Releases of thefuzz from 0.20 on count differently and name other options in a few of the
recorded answers; these are the rules of the releases before, which give the recorded verdicts.
"""

import re
from collections.abc import Callable
from difflib import SequenceMatcher

_OTHER = re.compile(r"[^\w]")


def nearest(text: str, options: list[str]) -> int:
    """The place of the best option; the first of equals."""
    scores = [weighted(plain(text), plain(option)) for option in options]
    return scores.index(max(scores))


def plain(text: str) -> str:
    return _OTHER.sub(" ", text).lower().strip()


def weighted(a: str, b: str) -> int:
    """WRatio: the best of whole, partial and word-wise scores, each with its weight."""
    if not a or not b:
        return 0
    longer = max(len(a), len(b)) / min(len(a), len(b))
    if longer < 1.5:
        return round(max(ratio(a, b), 0.95 * ratio(_sorted(a), _sorted(b)), 0.95 * _by_words(a, b, ratio)))
    scale = 0.6 if longer > 8 else 0.9
    words = max(partial(_sorted(a), _sorted(b)), _by_words(a, b, partial))
    return round(max(ratio(a, b), scale * partial(a, b), 0.95 * scale * words))


def ratio(a: str, b: str) -> int:
    if a == b:
        return 100
    return round(100 * SequenceMatcher(None, a, b).ratio()) if a and b else 0


def partial(a: str, b: str) -> int:
    """The best ratio of the shorter text to an equally long piece of the longer one, where a block of both matches."""
    if a == b:
        return 100
    if not a or not b:
        return 0
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    best = 0.0
    for block in SequenceMatcher(None, short, long).get_matching_blocks():
        start = max(0, block.b - block.a)
        found = SequenceMatcher(None, short, long[start : start + len(short)]).ratio()
        if found > 0.995:
            return 100
        best = max(best, found)
    return round(100 * best)


def _sorted(text: str) -> str:
    return " ".join(sorted(text.split()))


def _by_words(a: str, b: str, score: Callable[[str, str], int]) -> int:
    """The best score among the shared words and the shared words with each text's own."""
    x, y = set(a.split()), set(b.split())
    shared = " ".join(sorted(x & y))
    first, second = ((shared + " " + " ".join(sorted(own))).strip() for own in (x - y, y - x))
    return max(score(shared, first), score(shared, second), score(first, second))
