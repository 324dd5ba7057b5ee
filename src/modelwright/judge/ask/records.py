"""Rows of recorded runs."""

from pathlib import Path
from typing import Any

from modelwright.core.data.tables import table
from modelwright.core.errors import UserError, did_you_mean


def records(path: str | Path, needs: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a table, each holding the columns that it `needs`. Raises UserError for a file that is missing, empty or
    damaged, and for the first missing column, with the nearest one that is there."""
    path = Path(path)
    names, values = table(path)
    columns = [values(n) for n in names]
    rows = [{k: v for k, v in zip(names, row, strict=True) if v is not None} for row in zip(*columns, strict=True)]
    for i, row in enumerate(rows):
        for name in needs:
            if row.get(name) is None:
                what = f"row {i + 1} of {path} has no '{name}'" if name in names else f"{path} has no column '{name}'"
                raise UserError(what, how=did_you_mean(name, row))
    return rows
