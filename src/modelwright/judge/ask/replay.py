"""Recorded LLMBar runs recomputed: every verdict read again, every accuracy and agreement computed again and compared.

A folder holds `datasets.json` (subset -> pairs with a label), `evaluator_winners.jsonl[.gz]` (one row per evaluator,
strategy and subset: the winners of both orders as strings of 1, 2 and -, the accuracy and agreement that were reported,
for ratings the scores) and, where the judges' texts were kept, `completions*.jsonl[.gz]`.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, short
from modelwright.judge.ask.prompts import RECORDED, STRATEGIES
from modelwright.judge.ask.records import records
from modelwright.judge.ask.summary import Run
from modelwright.judge.ask.verdict import compare_ratings, measure, parse_verdict

Chosen = tuple[list[str], list[str]]  # strategies and subsets to keep


def pairs_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """subset -> pairs, each with input, output_1, output_2 and label, from a json of subsets or a table with those columns."""
    if file.suffix == ".json" and file.is_file() and (found := _subsets(file)):
        of = found
    else:
        of = {}
        for row in records(file, ("input", "output_1", "output_2", "label")):
            of.setdefault(str(row.get("subset") or file.stem), []).append(row)
    for name, rows in of.items():
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not {"input", "output_1", "output_2", "label"} <= row.keys():
                raise UserError(f"row {i + 1} of {name} in {file} is no pair", "it needs input, output_1, output_2 and label")
            row |= {k: str(row[k]) for k in ("input", "output_1", "output_2")}
            if str(row["label"]) not in ("1", "2"):
                raise UserError(f"row {i + 1} of {name} in {file} has label {row['label']!r}", "it must be 1 or 2, the better output")
    return of


def _subsets(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}  # the table reader says what is wrong
    return found if isinstance(found, dict) and found and all(isinstance(v, list) and v for v in found.values()) else {}


def replay(folder: Path) -> tuple[list[Run], dict[str, Any]]:
    """The runs in a folder, and counts of what was compared and what came out the same."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "recorded runs lie in a folder", "check the path")
    labels = {name: np.array([int(r["label"]) for r in rows]) for name, rows in pairs_of(folder / "datasets.json").items()}
    winners = next((f for f in sorted(folder.glob("evaluator_winners.jsonl*"))), folder / "evaluator_winners.jsonl")
    rows = records(winners, ("subset", "evaluator", "strategy", "winner_noswap", "winner_swap", "acc", "agreement"))
    kept = {}
    for file in sorted(folder.glob("completions*.jsonl*")):
        for row in records(file, ("subset", "evaluator", "strategy", "results")):
            kept[row["evaluator"], row["strategy"], row["subset"]] = row["results"]
    runs, seen = [], Counter[str]()
    for row in rows:
        name = (row["evaluator"], row["strategy"], row["subset"])
        if row["strategy"] not in RECORDED or row["subset"] not in labels:
            raise UserError(f"{winners} has the run {' '.join(name)}", "its strategy or its subset is not known")
        truth, where = labels[row["subset"]], f"the run {' '.join(name)} in {folder}"
        try:
            recorded = _codes(row["winner_noswap"], row["winner_swap"])
            verdicts = recorded
            if name in kept:
                verdicts = _reread(row["strategy"], kept[name], seen)
            elif "scores" in row:
                verdicts = np.array([compare_ratings(a, b, official=True) for a, b in row["scores"]]).T
            reported = float(row["acc"]), float(row["agreement"])
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{where} is damaged", f"{type(error).__name__}: {short(error)}", "copy or record it again") from None
        for read in (recorded, verdicts):
            if read.shape != (2, len(truth)):
                raise UserError(f"{where} has {read.shape[-1]} verdicts", f"its subset has {len(truth)} pairs", "copy or record it again")
        found = measure(verdicts, truth)
        seen["runs"] += 1
        seen["same winners"] += bool((verdicts == recorded).all())
        seen["same accuracy"] += abs(found["accuracy"] - reported[0]) < 1e-9
        seen["same agreement"] += abs(found["agreement"] - reported[1]) < 1e-9
        extra = {"recorded": {"accuracy": row["acc"], "agreement": row["agreement"]}, "from": "texts" if name in kept else "verdicts"}
        runs.append(Run(row["evaluator"], RECORDED[row["strategy"]], row["subset"], verdicts, truth, extra))
    return runs, dict(seen)


def _codes(*rows: str) -> np.ndarray:
    return np.array([[int(c) if c in "12" else 0 for c in row] for row in rows])


def _reread(strategy: str, results: list[list[Any]], seen: Counter[str]) -> np.ndarray:
    """The final verdicts (2, N) of one run from its texts; every text's verdict is compared with the one recorded for it."""
    s = STRATEGIES[RECORDED[strategy]]
    final = []
    for result in results:
        steps = [part for part in result if isinstance(part, dict)]
        if s.rating:
            first, second = (steps[-1][f"score_{i}"][0] for i in (1, 2))
            pair = compare_ratings(first, second, official=True)
            seen["ratings"] += 1
            seen["same ratings"] += pair == (_won(steps[-1], False), _won(steps[-1], True))
            seen["ratings strictly unparsed"] += compare_ratings(first, second)[0] == 0
        else:
            for i, part in enumerate(steps):
                form = ("explained" if s.explain else "direct") if i == 0 else s.reconcile or "direct"
                pair = _both(part, form, seen)
        final.append(pair)
    return np.array(final).T


def _both(part: dict[str, Any], form: Any, seen: Counter[str]) -> tuple[int, int]:
    """The verdicts of both orders, in the order of the data."""
    pair = []
    for swapped in (False, True):
        text = part[f"swap = {swapped}"]["completion"][0]
        said, strict = parse_verdict(text, form, official=True), parse_verdict(text, form)
        seen["completions"] += 1
        seen["completions strictly unparsed"] += strict == 0
        seen["completions strictly the other"] += strict not in (0, said)
        pair.append(3 - said if said and swapped else said)
        seen["same completions"] += pair[-1] == _won(part, swapped)
    return pair[0], pair[1]


def _won(part: dict[str, Any], swapped: bool) -> int:
    return int(part[f"swap = {swapped}"]["winner"] or 0)
