"""Every method on every family it fits: it saves, and a stock class loads what was saved; on the first family in bf16 too.

`make test` takes the first family of each method; `make slow` takes the others.
"""

from pathlib import Path

import pytest

from matrix import ROWS
from modelwright.testing import check_method

CASES = [(name, family, False) for name, row in ROWS.items() for family in row.families]
CASES += [(name, row.families[0], True) for name, row in ROWS.items() if row.families and row.families[0]]


def _id(case: tuple[str, str, bool]) -> str:
    name, family, bf16 = case
    return "-".join(w for w in (name, family, "bf16" * bf16) if w)


def _param(case: tuple[str, str, bool]) -> object:
    return pytest.param(*case, id=_id(case), marks=[pytest.mark.slow] if case[1] != ROWS[case[0]].families[0] else [])


@pytest.mark.parametrize(("name", "family", "bf16"), map(_param, CASES))
def test_method_saves_what_a_stock_class_loads(name: str, family: str, bf16: bool, tiny, tmp_path: Path) -> None:
    row = ROWS[name]
    make = row.data if isinstance(row.data, str) else ("tokens" if family else "text") if row.data else ""
    base = "seedling" if family == "seedling" else tiny(family) if family else None
    check_method(name, row.knobs, tmp_path, base=base, make=make, bf16=bf16, loads_in=row.loads_in.get(family, ""))
