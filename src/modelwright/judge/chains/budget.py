"""What a run of AoR says: accuracy beside the votes on the same chains, what it cost, and what became of every question."""

from collections import Counter
from typing import Any

import numpy as np

from modelwright.core.ask.desk import Counts, failures
from modelwright.core.numbers.stats import mcnemar
from modelwright.core.step import EvalResult
from modelwright.judge.chains import votes
from modelwright.judge.chains.answers import Choice, Kind, same
from modelwright.judge.chains.questions import COLUMNS, Measured, Question, coverage, measure, table_row

_SIZES = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40)
_WINDOWS = (2, 3, 4, 6, 8, 10, 5)  # the last, the paper's, is the one that the table shows
_CONFIDENCES = (0.7, 0.8, 0.9, 0.99, 0.95)  # the same
Curve = list[list[float]]  # points


def budget(
    asked: list[Question],
    chosen: list[Choice],
    smaller: list[list[Choice]],
    requests: Counts,
    *,
    kind: Kind,
    most: int,
    fallback: str,
) -> EvalResult:
    """Metrics, tables and budget curves.

    chosen: AoR's choice for each question. smaller: its choices with smaller budgets, for the curves. requests: the judge's
    counts. most: chains per question, at most. fallback: what a question without a winner gets.
    """
    most = min(most, max(len(q.chains) for q in asked))
    aor = measure(asked, chosen, kind)
    rivals, last_votes, curves = _votes(asked, kind, most)
    points = [aor, *(measure(asked, choices, kind) for choices in smaller)]
    curves["AoR"] = sorted([p["chains"], p["accuracy"]] for p in points)
    calls = sorted([p["calls"], p["accuracy"]] for p in points)
    outcomes = dict(Counter(c.status for c in chosen))
    p_value = mcnemar(_right(asked, chosen, kind), _right(asked, last_votes, kind))
    found: dict[str, Any] = {"questions": len(asked), "aor": aor, "requests": requests, "outcomes": outcomes, **rivals}
    found |= {"coverage": coverage(asked, kind, most), "curves": curves, "calls_curve": calls}
    found["p_against_self_consistency"] = p_value
    plots = [_line("Accuracy against chains", "chains per question", curves)]
    if smaller:
        plots.append(_line("AoR: accuracy against judge calls", "calls per question", {"AoR": calls}))
    vote = rivals["self-consistency"]
    lost = len(asked) - outcomes.get("ok", 0)
    return EvalResult(
        found,
        text=f"AoR is {_gain(aor['accuracy'] - vote['accuracy'])} self-consistency over {most} chains (p = {p_value:.2g}); "
        f"the right answer is among the chains of {found['coverage']:.1f} %.",
        tiles=[
            (f"{aor['accuracy']:.1f} %", "AoR", f"{aor['chains']:.2f} chains, {aor['calls']:.2f} calls a question"),
            (f"{vote['accuracy']:.1f} %", "self-consistency", f"{most} chains"),
            (str(lost), "questions without a winner", f"fallback: {fallback}"),
        ],
        tables=[
            {
                "title": f"Accuracy in percent; per question chains (at most {most}) and judge calls",
                "columns": COLUMNS,
                "rows": [table_row("AoR", aor), *(table_row(name, of) for name, of in rivals.items())],
            },
            {
                "title": "What became of the questions",
                "columns": ["outcome", "questions"],
                "rows": [[outcome, n] for outcome, n in outcomes.items()],
            },
            *failures(requests),
        ],
        plots=plots,
        facts={k: v for k, v in requests.items() if v and k != "failures_say"},
    )


def _votes(asked: list[Question], kind: Kind, most: int) -> tuple[dict[str, Measured], list[Choice], dict[str, Curve]]:
    """The rivals' measures by name, self-consistency's choices over all chains, and accuracy against chains for each."""
    sizes = [n for n in dict.fromkeys((*_SIZES, most)) if n <= most]
    by_size = [[votes.self_consistency(q.chains, kind, n) for q in asked] for n in sizes]
    ways: dict[str, list[list[Choice]]] = {
        "self-consistency": by_size,
        "ESC": [[votes.early_stopping(q.chains, kind, most, window) for q in asked] for window in _WINDOWS],
        "adaptive": [[votes.adaptive(q.chains, kind, most, confidence) for q in asked] for confidence in _CONFIDENCES],
    }
    rivals: dict[str, Measured] = {}
    curves: dict[str, Curve] = {}
    for name, settings in ways.items():
        measured = [measure(asked, choices, kind) for choices in settings]
        rivals[name] = measured[-1]
        curves[name] = sorted([m["chains"], m["accuracy"]] for m in measured)
    return rivals, by_size[-1], curves


def _right(asked: list[Question], chosen: list[Choice], kind: Kind) -> np.ndarray:
    """(questions,) bool"""
    return np.array([same(c.answer, q.answer, kind) for c, q in zip(chosen, asked, strict=True)])


def _gain(points: float) -> str:
    if not points:
        return "level with"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _line(title: str, x: str, series: dict[str, Curve]) -> dict[str, Any]:
    return {"kind": "line", "title": title, "x": x, "y": "percent", "series": series}
