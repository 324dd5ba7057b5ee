"""What a run of AoR says: accuracy beside the votes on the same chains, what it cost, and what became of every question."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from modelwright.core.job import Finding
from modelwright.core.numbers.stats import mcnemar
from modelwright.judge.aor import Knobs, run
from modelwright.judge.ask.judges import failures
from modelwright.judge.chains.answers import Choice, same
from modelwright.judge.chains.critic import Critic, Verifier
from modelwright.judge.chains.questions import COLUMNS, Question, coverage, measure, table_row
from modelwright.judge.select import select

_SIZES = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40)


def budget(asked: list[Question], chosen: list[Choice], scorer: Critic | Verifier, knobs: Knobs, seed: int = 0) -> Finding:
    """Metrics, tables and budget curves. A program scores more budgets for its curve; a model is not asked again."""
    most = min(knobs.max, max(len(q.chains) for q in asked))
    requests = scorer.plain()
    found: dict[str, Any] = {"questions": len(asked), "aor": measure(asked, chosen, knobs.kind), "requests": requests}
    found["outcomes"] = dict(Counter(c.status for c in chosen))
    votes: dict[str, list[Choice]] = {}
    curves: dict[str, list[list[float]]] = {"self-consistency": [], "ESC": [], "adaptive": []}
    for name, method, settings in (  # the last setting, its paper's, is the one that the table shows
        ("self-consistency", "self_consistency", [{"n": n} for n in dict.fromkeys((*_SIZES, most)) if n <= most]),
        ("ESC", "esc", [{"n": most, "window": w} for w in (2, 3, 4, 6, 8, 10, 5)]),
        ("adaptive", "adaptive", [{"n": most, "confidence": c} for c in (0.7, 0.8, 0.9, 0.99, 0.95)]),
    ):
        for s in settings:
            votes[name] = [select(q.chains, method, kind=knobs.kind, **s) for q in asked]
            of = measure(asked, votes[name], knobs.kind)
            curves[name].append([of["chains"], of["accuracy"]])
        found[name] = of
        curves[name].sort()
    calls = [[found["aor"]["calls"], found["aor"]["accuracy"]]]
    curves["AoR"] = [[found["aor"]["chains"], found["aor"]["accuracy"]]]
    if isinstance(scorer, Verifier):
        for part in (4, 2):
            small = replace(knobs, n=max(1, knobs.n // part), max=max(1, knobs.max // part), add=max(1, knobs.add // part))
            of = measure(asked, run(asked, scorer, small, seed), knobs.kind)
            curves["AoR"].append([of["chains"], of["accuracy"]])
            calls.append([of["calls"], of["accuracy"]])
    curves["AoR"].sort()
    found |= {"coverage": coverage(asked, knobs.kind, most), "curves": curves, "calls_curve": sorted(calls)}
    right = {k: np.array([same(c.answer, q.answer, knobs.kind) for c, q in zip(of, asked, strict=True)]) for k, of in votes.items()}
    ours = np.array([same(c.answer, q.answer, knobs.kind) for c, q in zip(chosen, asked, strict=True)])
    found["p_against_self_consistency"] = mcnemar(ours, right["self-consistency"])
    gain = found["aor"]["accuracy"] - found["self-consistency"]["accuracy"]
    plots = [{"kind": "line", "title": "Accuracy against chains", "x": "chains per question", "y": "percent", "series": curves}]
    if len(calls) > 1:
        plots.append(
            {
                "kind": "line",
                "title": "AoR: accuracy against judge calls",
                "x": "calls per question",
                "y": "percent",
                "series": {"AoR": sorted(calls)},
            }
        )
    tables = [
        {
            "title": f"Accuracy in percent; per question chains (at most {most}) and judge calls",
            "columns": COLUMNS,
            "rows": [table_row("AoR", found["aor"]), *(table_row(k, found[k]) for k in votes)],
        },
        {
            "title": "What became of the questions",
            "columns": ["outcome", "questions"],
            "rows": [list(kv) for kv in found["outcomes"].items()],
        },
    ]
    tables += failures(requests)
    how = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}" if gain else "level with"
    return Finding(
        found,
        text=f"AoR is {how} self-consistency over {most} chains (p = {found['p_against_self_consistency']:.2g}); "
        f"the right answer is among the chains of {found['coverage']:.1f} %.",
        tiles=[
            (
                f"{found['aor']['accuracy']:.1f} %",
                "AoR",
                f"{found['aor']['chains']:.2f} chains, {found['aor']['calls']:.2f} calls a question",
            ),
            (f"{found['self-consistency']['accuracy']:.1f} %", "self-consistency", f"{most} chains"),
            (str(len(asked) - found["outcomes"].get("ok", 0)), "questions without a winner", f"fallback: {knobs.fallback}"),
        ],
        tables=tables,
        plots=plots,
        facts={k: v for k, v in requests.items() if v and k != "failures_say"},
    )
