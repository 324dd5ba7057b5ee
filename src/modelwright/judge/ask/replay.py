"""Recorded LLMBar runs recomputed: every verdict read again, every accuracy and agreement computed again and compared.

A folder holds `datasets.json` (subset -> pairs with a label), `evaluator_winners.jsonl[.gz]` (one row per evaluator,
strategy and subset: the winners of both orders as strings of 1, 2 and -, the accuracy and agreement that were reported,
for ratings the scores) and, where the judges' texts were kept, `completions*.jsonl[.gz]`.

How a text is read belongs to the recorded run. The published code has one pattern per judge and strategy: after an explanation
all judges are read by "Output (a) is better.", except PaLM2 with CoT, which is read by the pattern for direct verdicts. A row
of completions may name its own: `form` is "direct" or "explained".
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np

from modelwright.core.errors import UserError, short
from modelwright.judge.ask.prompts import RECORDED, STRATEGIES
from modelwright.judge.ask.records import records
from modelwright.judge.ask.summary import Run
from modelwright.judge.ask.verdict import Form, compare_ratings, measure, parse_verdict

_FORMS: dict[tuple[str, str], Form] = {("PaLM2", "CoT"): "direct"}  # (evaluator, strategy), where it is not the strategy's own
_PAIR = ("input", "output_1", "output_2", "label")


def pairs_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """subset -> pairs, each with input, output_1, output_2 and label, from a json of subsets or a table with those columns.

    Raises UserError for a pair that is not whole, or that stands twice in its subset.
    """
    of = _subsets(file)
    if not of:
        for row in records(file, _PAIR):
            of.setdefault(str(row.get("subset") or file.stem), []).append(row)
    for name, rows in of.items():
        seen: dict[tuple[str, ...], int] = {}
        for i, row in enumerate(rows, 1):
            texts = _check_pair(row, f"row {i} of {name} in {file}")
            if texts in seen:
                raise UserError(
                    f"row {i} of {name} in {file} is row {seen[texts]} again", "a pair that stands twice would count twice", "drop one"
                )
            seen[texts] = i
    return of


def _check_pair(row: Any, where: str) -> tuple[str, ...]:
    """The three texts of a pair, which are made texts in place."""
    if not isinstance(row, dict) or not set(_PAIR) <= row.keys():
        raise UserError(f"{where} is no pair", "it needs input, output_1, output_2 and label")
    for name in _PAIR[:3]:
        if isinstance(row[name], bool) or not isinstance(row[name], (str, int, float)):
            raise UserError(f"{where} has no text in {name}", f"it holds {str(row[name])[:40]!r}", "write a text")
        row[name] = str(row[name])
    if str(row["label"]) not in ("1", "2"):
        raise UserError(f"{where} has label {repr(row['label'])[:40]}", "it must be 1 or 2, the better output")
    return tuple(row[name] for name in _PAIR[:3])


def _subsets(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of a json file of subsets; empty where it is none, and the table reader says what is wrong."""
    if file.suffix != ".json" or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and found and all(isinstance(v, list) and v for v in found.values())
    return found if whole else {}


def replay(folder: Path) -> tuple[list[Run], dict[str, int]]:
    """The runs in a folder, and counts of what was compared and what came out the same."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "recorded runs lie in a folder", "check the path")
    labels = {name: np.array([int(r["label"]) for r in rows]) for name, rows in pairs_of(folder / "datasets.json").items()}
    files = sorted(folder.glob("evaluator_winners.jsonl*"))
    winners = files[0] if files else folder / "evaluator_winners.jsonl"
    rows = _by_run(winners, records(winners, ("subset", "evaluator", "strategy", "winner_noswap", "winner_swap", "acc", "agreement")))
    texts: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted(folder.glob("completions*.jsonl*")):
        texts |= _by_run(file, records(file, ("subset", "evaluator", "strategy", "results")), texts)
    runs, seen = [], Counter[str]()
    for name, row in rows.items():
        evaluator, strategy, subset = name
        if strategy not in RECORDED or subset not in labels:
            raise UserError(f"{winners} has the run {' '.join(name)}", "its strategy or its subset is not known")
        truth, where = labels[subset], f"the run {' '.join(name)} in {folder}"
        try:
            recorded = _codes(row["winner_noswap"], row["winner_swap"])
            reported = _percent(row["acc"]), _percent(row["agreement"])
            verdicts = recorded
            if name in texts:
                verdicts = _reread(evaluator, strategy, texts[name], seen)
            elif "scores" in row:
                verdicts = np.array([compare_ratings(a, b, official=True) for a, b in row["scores"]]).T
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{where} is damaged", f"{type(error).__name__}: {short(error)}", "copy or record it again") from None
        for read in (recorded, verdicts):
            if read.shape != (2, len(truth)):
                raise UserError(f"{where} has {read.shape[-1]} verdicts", f"its subset has {len(truth)} pairs", "copy or record it again")
        found = measure(verdicts, truth, official=True)
        seen["runs"] += 1
        seen["same winners"] += bool((verdicts == recorded).all())
        seen["same accuracy"] += abs(found["accuracy"] - reported[0]) < 1e-9
        seen["same agreement"] += abs(found["agreement"] - reported[1]) < 1e-9
        extra = {
            "recorded": {"accuracy": row["acc"], "agreement": row["agreement"]},
            "from": "texts" if name in texts else "verdicts",
        }
        runs.append(Run(evaluator, RECORDED[strategy], subset, verdicts, truth, extra, official=True))
    return runs, dict(seen)


def _by_run(
    file: Path, rows: list[dict[str, Any]], known: dict[tuple[str, ...], Any] | None = None
) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows by (evaluator, strategy, subset). Raises UserError for a run that stands twice."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for i, row in enumerate(rows, 1):
        name = tuple(str(row[k]) for k in ("evaluator", "strategy", "subset"))
        if name in found or name in (known or {}):
            raise UserError(
                f"row {i} of {file} has the run {' '.join(name)} again", "a run that stands twice would count twice", "drop one"
            )
        found[name] = row
    return found


def _percent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError(f"{str(value)[:40]!r} is no percentage")
    return float(value)


def _codes(*rows: Any) -> np.ndarray:
    """(orders, pairs) of 1, 2 and 0"""
    for row in rows:
        if not isinstance(row, str) or set(row) - set("12-"):
            raise ValueError(f"{str(row)[:40]!r} holds something beside 1, 2 and -")
    return np.array([["-12".index(c) for c in row] for row in rows])


def _reread(evaluator: str, strategy: str, run: dict[str, Any], seen: Counter[str]) -> np.ndarray:
    """The final verdicts (2, N) of one run from its texts; every text's verdict is compared with the one recorded for it."""
    s = STRATEGIES[RECORDED[strategy]]
    form: Form = _FORMS.get((evaluator, strategy), "explained" if s.explain else "direct")
    form = run.get("form") or form
    if form not in get_args(Form):
        raise ValueError(f"form is {str(form)[:40]!r}, and must be direct or explained")
    final = []
    for result in run["results"]:
        steps = [part for part in result if isinstance(part, dict)]
        if s.rating:
            pair = _rated(steps[-1], seen)
        else:
            pair = _both(steps[0], form, seen)
            for part in steps[1:]:
                pair = _both(part, s.reconcile or "direct", seen)
        final.append(pair)
    return np.array(final).T


def _rated(part: dict[str, Any], seen: Counter[str]) -> tuple[int, int]:
    """The verdicts of both orders from two recorded ratings."""
    first, second = (part[f"score_{i}"][0] for i in (1, 2))
    pair = compare_ratings(first, second, official=True)
    seen["ratings"] += 1
    seen["same ratings"] += pair == (_won(part, False), _won(part, True))
    seen["ratings strictly unparsed"] += compare_ratings(first, second)[0] == 0
    return pair


def _both(part: dict[str, Any], form: Form, seen: Counter[str]) -> tuple[int, int]:
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
