"""A row as token ids: the schema's own vocabulary, or the words of a checkpoint's tokenizer ("age is 1 2 . 5, sex is male,")."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError
from modelwright.modalities.tabular.columns import DONE, MISSING, Category, Columns, Field, Free, Padded, field, rows_of

END = "<end>"
_KINDS = {"Category": Category, "Padded": Padded, "Free": Free}
_CHARACTERS = "0123456789.-+e"


class Language:
    """Symbols of the fields of one or several tables as token ids. `tokenizer`: the text form of a checkpoint."""

    def __init__(self, tables: list[list[Field]], tokenizer: Any = None):
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        if tokenizer is not None:
            self._text()
            return
        places = [f"{d}@{p}" for p in range(1, 14) for d in range(10)]
        symbols = [END, MISSING, *_CHARACTERS, *places]
        for f in (f for fields in tables for f in fields):
            symbols += [f"column {f.name}", *([s for w in f.spelled for s in w] if isinstance(f, Category) else [])]
        self.ids = {s: i for i, s in enumerate(dict.fromkeys(symbols))}

    def _text(self) -> None:
        for c in _CHARACTERS:
            self.ids[c] = self.words(" " + c)[-1]
        self._marks()
        if len({self.ids[c] for c in _CHARACTERS}) < len(_CHARACTERS):
            raise UserError("the tokenizer cannot write numbers", "two of the characters 0 to 9 . - + e are one token", "use no base")

    def _marks(self) -> None:
        """What ends a value and what stands for a gap: a comma and None, or the next that no category is written with."""
        for mark, candidates in ((END, (",", ";", "\n", " |", "=")), (MISSING, (" None", " NaN", " missing", " ?"))):
            taken = {i for s, i in self.ids.items() if s not in (END, MISSING)}
            free = [w for w in candidates if self.words(w)[-1] not in taken]
            if not free:
                raise UserError(
                    "the table uses every sign that could end a value", f"{' '.join(map(repr, candidates))} are tried", "use no base"
                )
            self.ids[mark] = self.words(free[0])[-1]

    def words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def symbols(self, word: str) -> tuple[str, ...]:
        """The text form of a category: a symbol for each of its tokens."""
        found = tuple(f"#{i}" for i in self.words(" " + word))
        self.ids |= {s: int(s[1:]) for s in found}
        return found

    def fields(self, columns: Columns) -> list[Field]:
        """The fields of a table in this language's form."""
        found = [field(n, v, self.symbols if self.tokenizer is not None else None) for n, v in columns.items()]
        if self.tokenizer is not None:
            self._marks()
        return found

    @property
    def size(self) -> int:
        return len(self.ids)

    def name(self, f: Field) -> list[int]:
        """What stands before a value."""
        return [self.ids[f"column {f.name}"]] if self.tokenizer is None else self.words(f" {f.name} is")

    def value(self, f: Field, value: Any) -> list[int]:
        """A value and, where it could go on, the end."""
        if value is None:
            if not f.gaps:
                raise UserError(f"'{f.name}' has a gap", "the table that was learnt has none there", "fill or leave out the row")
            return [self.ids[MISSING], *([self.ids[END]] if self.tokenizer is not None else [])]
        symbols = f.spell(value)
        return [*(self.ids[s] for s in symbols), *([self.ids[END]] if self.ends(f, symbols) else [])]

    def ends(self, f: Field, symbols: tuple[str, ...]) -> bool:
        """Whether an end token follows: always in the text form, else where more symbols could follow."""
        return self.tokenizer is not None or f.options(symbols) != (DONE,)

    def cell(self, f: Field, value: Any) -> list[int]:
        return self.name(f) + self.value(f, value)

    def read(self, ids: list[int], fields: list[Field]) -> dict[str, Any]:
        """The row that token ids stand for, in whatever order its columns are; what `cell` wrote, read back."""
        row: dict[str, Any] = {}
        at = 0
        while at < len(ids):
            names = [(f, self.name(f)) for f in fields if f.name not in row]
            f, name = max(((f, n) for f, n in names if ids[at : at + len(n)] == n), key=lambda pair: len(pair[1]))
            at += len(name)
            begun: tuple[str, ...] = ()
            empty = self.value(f, None) if f.gaps else [-1]
            gap = ids[at : at + len(empty)] == empty
            while not gap and not (begun and f.options(begun) == (DONE,)) and ids[at] != self.ids[END]:
                begun = (*begun, next(s for s in f.options(begun) if s != DONE and self.ids[s] == ids[at]))
                at += 1
            row[f.name] = None if gap else f.read(begun)
            at += len(empty) if gap else int(self.ends(f, begun))
        return {f.name: row[f.name] for f in fields}

    def rows(self, tables: list[tuple[list[Field], Columns]]) -> "TableRows":
        """Rows of one table or of several; the values are learnt, the names are not."""
        made, labels, cells = [], [], []
        for fields, columns in tables:
            names = {f.name: self.name(f) for f in fields}
            for row in rows_of(columns):
                ids: list[int] = []
                learnt: list[int] = []
                of: list[int] = []
                for k, f in enumerate(fields):
                    value = self.value(f, row[f.name])
                    ids += names[f.name] + value
                    learnt += [IGNORE] * len(names[f.name]) + value
                    of += [k] * (len(names[f.name]) + len(value))
                made.append(ids)
                labels.append(learnt)
                cells.append(of)
        lengths = torch.tensor([len(ids) for ids in made])
        width = int(lengths.max())
        return TableRows(_padded(made, width, 0).int(), _padded(labels, width, IGNORE), lengths, cells=_padded(cells, width, -1))

    def save(self, file: Path, fields: list[Field]) -> None:
        """Fields and symbols as json."""
        kept = [{"kind": type(f).__name__, **asdict(f)} for f in fields]
        file.write_text(json.dumps({"text": self.tokenizer is not None, "symbols": self.ids, "fields": kept}, indent=1) + "\n")

    @classmethod
    def load(cls, file: Path, tokenizer: Any = None) -> "tuple[Language, list[Field]]":
        raw = json.loads(file.read_text())
        language = cls([], tokenizer if raw["text"] else None)
        language.ids = raw["symbols"]
        return language, [_field(f) for f in raw["fields"]]


def _field(raw: dict[str, Any]) -> Field:
    kind = _KINDS[raw.pop("kind")]
    for k in ("values", "exponents"):
        if k in raw:
            raw[k] = tuple(raw[k])
    if "spelled" in raw:
        raw["spelled"] = tuple(map(tuple, raw["spelled"]))
    return kind(**raw)


@dataclass
class TableRows(Rows):
    """Rows whose tokens know the column that they belong to: cells (N, T), -1 beyond the end."""

    cells: Tensor | None = None

    def __getitem__(self, i: int) -> dict[str, Any]:
        assert self.cells is not None
        return super().__getitem__(i) | {"cells": self.cells[i]}


def _padded(lists: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([v + [fill] * (width - len(v)) for v in lists], dtype=torch.long)
