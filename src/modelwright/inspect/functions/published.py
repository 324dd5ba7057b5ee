"""The published figures of arXiv 2305.18390, recomputed from the authors' recorded results.

A folder with any of: switch_perturbation_128shot.csv (accuracy of Switch with its routing restricted to functional experts,
to as many others, or not at all), t5_perturbation_results.txt (accuracy of T5 with a share of its neurons disturbed),
spearman_stabilization.csv (rank correlation of predictivity between checkpoints). The standard deviation that the official
script prints is a fraction beside a percentage; ours is in percent.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError

SWITCH, T5, SPEARMAN = "switch_perturbation_128shot.csv", "t5_perturbation_results.txt", "spearman_stabilization.csv"
FIGURES = {"a": ("sst2", "mrpc", "cola", "qqp"), "b": ("mnli", "qnli", "cb", "multirc", "boolq")}


def published(folder: Path) -> dict[str, Any]:
    """What the files in `folder` give: switch, t5, stabilisation."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", how="give the folder with the recorded results")
    readers = {"switch": (SWITCH, _switch), "t5": (T5, _t5), "stabilisation": (SPEARMAN, _spearman)}
    there = {key: read(folder / name) for key, (name, read) in readers.items() if (folder / name).is_file()}
    if not there:
        raise UserError(f"{folder} holds no recorded results", f"there is none of {SWITCH}, {T5}, {SPEARMAN}", "check the folder")
    return there


def _rows(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8", errors="replace") as handle:
        rows = list(csv.DictReader(handle))
    for name in columns:
        if not rows or name not in rows[0]:
            raise UserError(f"{file} has no column '{name}'" if rows else f"{file} holds no rows", how=f"it needs {', '.join(columns)}")
    return rows


def _number(text: str | None, file: Path, line: int) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"line {line} of {file} does not fit", f"{text!r} is no number", "copy the file again") from None


def _switch(file: Path) -> dict[str, Any]:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line, row in enumerate(_rows(file, ("dataset", "strategy", "best_validation_accuracy")), 2):
        values[row["strategy"]][row["dataset"]].append(100 * _number(row["best_validation_accuracy"], file, line))
    found = {}
    for strategy, by in values.items():
        means = {name: statistics.mean(v) for name, v in by.items()}
        spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in by.items()}
        seeds = {name: len(v) for name, v in by.items()}
        found[strategy] = {"average": statistics.mean(means.values()), "datasets": means, "std": spread, "seeds": seeds}
    return found


def _t5(file: Path) -> dict[str, Any]:
    values: dict[tuple[str, str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = text.split()
        if len(words) != 7:
            raise UserError(f"line {line} of {file} does not fit", f"it has {len(words)} of 7 words", "copy the file again")
        task, method, share, _, _, source, accuracy = words
        name = f"ap({source})" if method == "ap" else method
        values[name, source, int(_number(share, file, line))][task].append(_number(accuracy, file, line))
    found: dict[str, Any] = {}
    for figure, tasks in FIGURES.items():
        rows: dict[str, dict[str, float]] = defaultdict(dict)
        for (name, _, disturbed), by in sorted(values.items(), key=lambda item: item[0][2]):
            if all(t in by for t in tasks):
                rows[name][str(disturbed)] = statistics.mean(statistics.mean(by[t]) for t in tasks)
        found[f"figure 2{figure}"] = {"tasks": list(tasks), "accuracy": dict(rows)}
    return found


def _spearman(file: Path) -> dict[str, Any]:
    values: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for line, row in enumerate(_rows(file, ("model", "level", "function", "interval", "spearman")), 2):
        key = row["model"], row["level"], row["function"], int(_number(row["interval"], file, line))
        values[key].append(_number(row["spearman"], file, line))
    found: dict[str, Any] = {}
    order = {"semantic": 0, "knowledge": 1, "task": 2}  # the paper's
    for (model, level, function, _), v in sorted(values.items(), key=lambda item: (order.get(item[0][2], 3), item[0][3])):
        found.setdefault(model, {}).setdefault(level, {}).setdefault(function, []).append(statistics.mean(v))
    return found
