"""Rows of instructions and responses: read from any table, written with their origin, each loss with its reason."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelwright.core.ask.desk import Counts, failures
from modelwright.core.data.read import iter_rows
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data
from modelwright.core.step import EvalResult

SAMPLE = Path(__file__).parents[2] / "data" / "openbezoar-twin"
ASKED = ("instruction", "prompt", "question", "inputs")
MORE = ("input", "context")
SAID = ("response", "output", "completion", "answer")


@dataclass(frozen=True)
class Row:
    """An instruction, what was said to it, the system message, the row of the source, and that row's columns."""

    instruction: str
    response: str
    system: str
    place: int
    columns: dict[str, Any] = field(default_factory=dict)


def read_rows(data: Data, response: bool = False) -> list[Row]:
    """The rows of a table or hub dataset. Raises UserError for one without an instruction, or without a wanted response."""
    if not data.path:
        raise UserError("no data was given", "instructions are read from a table", "give --data FILE")
    found: list[Row] = []
    for i, columns in enumerate(iter_rows(replace(data, path=shipped(data.path, "seeds")))):
        system, asked, said = _texts(columns, data.column)
        where = f"row {i + 1} of {data.path}"
        if not asked.strip():
            how = did_you_mean(data.column, columns) if data.column else f"name it {', '.join(ASKED)}, or give data.column"
            raise UserError(f"{where} has no instruction", how=how)
        if response and not said.strip():
            raise UserError(f"{where} has no response", "it is what is judged", f"name its column {', '.join(SAID)}")
        found.append(Row(asked, said, system, i, columns))
    if not found:
        raise UserError(f"{data.path} holds no rows", how="give a table with at least one")
    return found


def shipped(path: str, name: str) -> str:
    """A file of the sample that comes with the package, where its name is given and nothing of that name is here."""
    return str(SAMPLE / f"{name}.jsonl") if path == SAMPLE.name and not Path(path).exists() else path


def _texts(columns: dict[str, Any], name: str | None) -> tuple[str, str, str]:
    """(system, instruction, response) of a row; empty texts where it has none."""
    if isinstance(turns := columns.get("messages"), list) and name in (None, "messages", "text"):
        by_role = {t.get("role"): str(t.get("content") or "") for t in reversed(turns) if isinstance(t, dict)}  # the first of each role
        return by_role.get("system", ""), by_role.get("user", ""), by_role.get("assistant", "")
    names = [name] if name and name in columns else ASKED if name in (None, "text") else []
    asked = _first(columns, names)
    if more := _first(columns, MORE):
        asked = f"{asked}\n\n{more}" if asked else ""
    return str(columns.get("system") or ""), asked, _first(columns, SAID)


def _first(columns: dict[str, Any], names: Iterable[str]) -> str:
    return next((columns[n] for n in names if isinstance(columns.get(n), str) and columns[n].strip()), "")


def template(system: str, instruction: str) -> str:
    """OpenBezoar's prompt, from its model card; a row without a system message has no such block."""
    before = f"### System:\n{system}\n\n" if system else ""
    return f"{before}### Instruction:\n{instruction}\n\n### Response:\n"


@dataclass
class Harvest:
    """Rows that are kept, rows that are not, and why."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def keep(self, row: Row, **origin: Any) -> None:
        """A row in three forms: messages, the text of OpenBezoar's template, and columns."""
        turns = [("system", row.system)] if row.system else []
        turns += [("user", row.instruction), ("assistant", row.response)]
        self.kept.append(
            {
                "messages": [{"role": role, "content": text} for role, text in turns],
                "text": template(row.system, row.instruction) + row.response,
                "system": row.system,
                "instruction": row.instruction,
                "response": row.response,
                "source": row.place,
                **origin,
            }
        )

    def drop(self, reason: str, place: int, **texts: str) -> None:
        self.reasons[reason] += 1
        self.removed.append({"reason": reason, "source": place, **texts})

    def write(self, folder: Path) -> None:
        """dataset.jsonl and removed.jsonl. Raises UserError where nothing was kept."""
        if not self.kept:
            lost = "; ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common(3))
            raise UserError("no row was kept", lost or "nothing was written", "ask a stronger model; --cache FILE keeps its answers")
        for name, rows in (("dataset.jsonl", self.kept), ("removed.jsonl", self.removed)):
            with open(folder / name, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def finding(self, text: str, counts: Counts, facts: dict[str, Any]) -> EvalResult:
        """The result of the step: counts for scripts, two tables for people."""
        metrics = {"kept": len(self.kept), "removed": dict(self.reasons), **facts, "requests": counts}
        schemes = Counter(str(row.get("scheme", "")) for row in self.kept)
        return EvalResult(
            metrics,
            text=text,
            tiles=[
                (f"{len(self.kept):,}", "rows kept", ""),
                (f"{sum(self.reasons.values()):,}", "removed", ""),
                (f"{counts['requests']:,}", "requests", f"{counts['reused']:,} from the kept answers"),
            ],
            tables=[
                {"title": "Kept", "columns": ["scheme", "rows"], "rows": [[k, n] for k, n in schemes.most_common()]},
                {"title": "Removed", "columns": ["reason", "rows"], "rows": [[k, n] for k, n in self.reasons.most_common()]},
                *failures(counts),
            ],
        )
