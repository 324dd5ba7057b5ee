"""Does a generated question repeat another one, or one of a test set?

Two questions are the same where their words are, whatever capitals and marks. A question also repeats a test set where it shares a run
of n words with one of its questions; 13 is the usual length.
"""

import re
from collections.abc import Iterable

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


class Seen:
    """Questions seen so far; with n, also their runs of n words."""

    def __init__(self, texts: Iterable[str] = (), n: int = 0):
        self.n = n
        self.whole: set[tuple[str, ...]] = set()
        self.runs: set[tuple[str, ...]] = set()
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        of = words(text)
        self.whole.add(of)
        self.runs.update(self._runs(of))

    def __contains__(self, text: str) -> bool:
        of = words(text)
        return of in self.whole or not self.runs.isdisjoint(self._runs(of))

    def _runs(self, of: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {of[i : i + self.n] for i in range(len(of) - self.n + 1)} if self.n else set()
