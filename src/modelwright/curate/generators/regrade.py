"""The released answers of LLMs-as-Instructors graded again: by the published grader, and by ours.

A folder holds files whose names end in `_right.jsonl` and `_wrong.jsonl`: task rows with the student's `response`, and for code the
`completion` that was run.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelwright.core.data.tables import records
from modelwright.core.errors import UserError
from modelwright.core.step import EvalResult
from modelwright.curate.generators.grade import grade, kind_of

NAMES = {"code": "code (MBPP)", "number": "numbers (GSM8K)", "choice": "choices (MMLU)"}


def regrade(folder: Path, out: Path, tick: Callable[[int], None]) -> EvalResult:
    """Grade every recorded answer twice; write all rows with their grades to `out`/dataset.jsonl."""
    files = [f for verdict in ("right", "wrong") for f in sorted(folder.glob(f"*_{verdict}.jsonl*"))] if folder.is_dir() else []
    if not files:
        raise UserError(f"no recorded answers in {folder}", "files that end in _right.jsonl and _wrong.jsonl are read", "check the path")
    found: dict[str, Counter[str]] = {}
    how: dict[str, Counter[str]] = {}
    with open(out / "dataset.jsonl", "w", encoding="utf-8") as pen:
        for file in files:
            recorded = file.name.partition(".")[0].endswith("_right")
            for i, row in enumerate(records(file), 1):
                kind = kind_of(row)
                if kind is None or not isinstance(row.get("response"), str):
                    raise UserError(f"row {i} of {file} is no answered task", "it needs a task's columns and its response", "drop it")
                published, ours = grade(kind, row, row["response"], official=True), grade(kind, row, row["response"])
                count = found.setdefault(kind, Counter())
                name = "right" if recorded else "wrong"
                count[f"recorded {name}"] += 1
                count[f"{name}, published grader says right"] += published.right
                count[f"{name}, ours says right"] += ours.right
                how.setdefault(kind, Counter())[ours.how] += ours.right
                grades = {"recorded": recorded, "published": published.right, "ours": ours.right, "how": ours.how}
                pen.write(json.dumps(row | {"grades": grades}, ensure_ascii=False) + "\n")
                tick(1)
    return _finding(found, how)


def _finding(found: dict[str, Counter[str]], how: dict[str, Counter[str]]) -> EvalResult:
    metrics: dict[str, Any] = {}
    rows = []
    for kind, c in found.items():
        false_errors = c["wrong, ours says right"]
        metrics[kind] = {
            "recorded_right": c["recorded right"],
            "right_again": c["right, published grader says right"],
            "right_by_ours": c["right, ours says right"],
            "recorded_wrong": c["recorded wrong"],
            "wrong_that_pass_the_published_grader": c["wrong, published grader says right"],
            "false_errors": false_errors,
            "read_as": {k: n for k, n in how[kind].items() if n},
        }
        rows.append(
            [
                NAMES[kind],
                f"{c['right, published grader says right']:,} of {c['recorded right']:,}",
                f"{c['wrong, published grader says right']:,} of {c['recorded wrong']:,}",
                f"{false_errors:,} of {c['recorded wrong']:,}",
            ]
        )
    total = sum(m["false_errors"] for m in metrics.values())
    return EvalResult(
        metrics,
        text=f"{total:,} answers were recorded as wrong and are right: they were read badly. An instructor would have been paid for them.",
        tiles=[(f"{total:,}", "false errors", "recorded as wrong, right when read in another way")],
        tables=[
            {
                "title": "Recorded answers, graded again",
                "columns": ["tasks", "recorded right, right again", "recorded wrong, pass the published grader", "false errors"],
                "rows": rows,
            }
        ],
    )
