"""Which documents hold text of a named evaluation set: a run of n words of one of its texts, 13 in most reports.

A shorter text, of 8 words or more, is looked for as a whole. One of fewer words is in too many documents by chance: it is counted
and not looked for. Words are those of kernels/words.py, so capitals and marks do not matter.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.data.read import iter_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate.kernels.words import ngrams, words

LEAST = 8  # words of a text that is looked for


class Evaluations:
    """The runs of words of each set. `short` counts texts that are not looked for."""

    def __init__(self, sets: dict[str, list[str]], n: int = 13):
        self.names, self.short = list(sets), 0
        self.grams: dict[int, dict[str, np.ndarray]] = {}  # length of the run -> set -> its hashes
        for name, texts in sets.items():
            w = words(texts)
            sizes = np.bincount(w.doc, minlength=len(texts))
            self.short += int((sizes < LEAST).sum())
            for size in sorted({min(int(s), n) for s in sizes if s >= min(LEAST, n)}):
                h, doc = ngrams(w, size)
                mine = h[(sizes[doc] == size) | (size == n)]
                self.grams.setdefault(size, {})[name] = np.unique(mine)

    def of(self, texts: list[str]) -> list[list[str]]:
        """The sets that each text holds a run of, in the order in which they are named."""
        w = words(texts)
        found = np.zeros((len(texts), len(self.names)), bool)
        for size, sets in self.grams.items():
            h, doc = ngrams(w, size)
            for name, grams in sets.items():
                found[doc[np.isin(h, grams)], self.names.index(name)] = True
        return [[self.names[j] for j in np.flatnonzero(row)] for row in found]


def read_evaluations(paths: dict[str, Any], n: int) -> Evaluations:
    """All texts in all columns of tables or hub datasets, as name: PATH. Raises UserError for a set without text."""
    sets = {}
    for name, path in paths.items():
        file = Path(str(path)).expanduser()
        if file.suffix == ".txt" and file.is_file():
            sets[name] = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        else:
            sets[name] = [t for row in iter_rows(Data(str(path))) for t in _texts(row.values())]
        if not sets[name]:
            raise UserError(f"the evaluation set {name} holds no text", f"{path} was read", "give a table or a text file")
    return Evaluations(sets, n)


def _texts(values: Iterable[Any]) -> list[str]:
    found = []
    for value in values:
        if isinstance(value, str):
            found += [value] if value.strip() else []
        elif isinstance(value, dict):
            found += _texts(value.values())
        elif isinstance(value, list):
            found += _texts(value)
    return found
