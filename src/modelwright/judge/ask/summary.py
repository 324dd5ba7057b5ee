"""What judged pairs say: averages as LLMBar reports them, tests between strategies, tables and pictures."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelwright.core.job import Finding
from modelwright.judge.ask.prompts import STRATEGIES
from modelwright.judge.ask.verdict import differ, measure

NATURAL = "LLMBar/Natural"
ADVERSARIAL = tuple(f"LLMBar/Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual"))


@dataclass
class Run:
    """One evaluator with one strategy on one subset: verdicts (2, N), both orders in the order of the data; labels (N,)."""

    evaluator: str
    strategy: str
    subset: str
    verdicts: np.ndarray
    labels: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        names = {"evaluator": self.evaluator, "strategy": self.strategy, "subset": self.subset}
        return names | measure(self.verdicts, self.labels) | self.extra


def averages(runs: list[Run]) -> list[dict[str, Any]]:
    """One row per evaluator and strategy: Natural, Adversarial (plain mean of its four subsets) and overall (plain mean of the
    five; of whatever subsets there are, where it is not those five), with p against the evaluator's first strategy (see `differ`)."""
    groups: dict[tuple[str, str], dict[str, Run]] = {}
    for run in sorted(runs, key=lambda r: list(STRATEGIES).index(r.strategy)):
        groups.setdefault((run.evaluator, run.strategy), {})[run.subset] = run
    rows = []
    for (evaluator, strategy), of in sorted(groups.items(), key=lambda g: g[0][0]):
        whole = {NATURAL, *ADVERSARIAL} <= set(of)
        over = {s: of[s] for s in (NATURAL, *ADVERSARIAL)} if whole else of
        row: dict[str, Any] = {"evaluator": evaluator, "strategy": strategy, "subsets": len(over)}
        parts = {"natural": [NATURAL], "adversarial": ADVERSARIAL} if whole else {}
        for part, subsets in (parts | {"overall": list(over)}).items():
            each = [measure(over[s].verdicts, over[s].labels) for s in subsets]
            row[part] = {k: float(np.mean([m[k] for m in each])) for k in ("accuracy", "agreement", "unparsed")}
            row[part]["by_place"] = {k: float(np.mean([m["by_place"][k] for m in each])) for k in ("first", "second")}
        spread = [(run.verdicts == run.labels).mean(0).var() / len(run.labels) for run in over.values()]
        row["overall"]["accuracy_half_width"] = 196 * float(np.sqrt(sum(spread))) / len(spread)  # 95 %, from the pairs
        _, base = next((n, g) for (e, n), g in groups.items() if e == evaluator)
        if base is not of and set(base) >= set(over):
            a, b = (np.concatenate([runs_of[s].verdicts for s in over], axis=1) for runs_of in (base, over))
            row["p_against_first"] = differ(a, b, np.concatenate([r.labels for r in over.values()]))
        rows.append(row)
    return rows


def finding(runs: list[Run]) -> Finding:
    """Metrics, a table per evaluator and the pictures."""
    rows = averages(runs)
    tables = []
    for evaluator in dict.fromkeys(r["evaluator"] for r in rows):
        of = [r for r in rows if r["evaluator"] == evaluator]
        parts = [p for p in ("natural", "adversarial", "overall") if all(p in r for r in of)]
        lines = []
        for r in of:
            cells = [f"{r[p][k]:.1f}" for p in parts for k in ("accuracy", "agreement")]
            cells.insert(-1, f"{r['overall']['accuracy_half_width']:.1f}")
            p = f"{r['p_against_first']:.1g}" if "p_against_first" in r else ""
            lines.append([r["strategy"], *cells, f"{r['overall']['unparsed']:.1f}", p])
        heads = [h for p in parts for h in ({"natural": "Natural", "adversarial": "Advers.", "overall": "all"}[p], "agr.")]
        columns = ["strategy", *heads[:-1], "±", "agr.", "unp.", "p"]
        title = f"{_short(evaluator)}: accuracy and agreement of both orders, percent; p against {of[0]['strategy']}"
        tables.append({"title": title, "columns": columns, "rows": lines})
    return Finding({"runs": [r.plain() for r in runs], "averages": rows}, tables=tables, plots=_plots(runs, rows))


def _plots(runs: list[Run], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plots: list[dict[str, Any]] = []
    evaluators = list(dict.fromkeys(r["evaluator"] for r in rows))
    used = [s for s in STRATEGIES if any(r["strategy"] == s for r in rows)]
    key = ", ".join(f"{STRATEGIES[s].short} {s.replace('_', ' ')}" for s in used)
    overall = {(r["evaluator"], r["strategy"]): r["overall"] for r in rows}
    for e in evaluators:
        of = [s for s in used if (e, s) in overall]
        plots.append(
            {
                "kind": "bars",
                "title": f"{_short(e)}: every strategy",
                "y": "percent",
                "groups": [STRATEGIES[s].short for s in of],
                "series": {
                    "Accuracy": [overall[e, s]["accuracy"] for s in of],
                    "Agreement": [overall[e, s]["agreement"] for s in of],
                    "First shown wins both": [overall[e, s]["by_place"]["first"] for s in of],
                },
                "line": {"at": 50, "name": "chance"},
                "note": key if e == evaluators[0] else "",
            }
        )
    accuracy = {(r.evaluator, r.strategy, r.subset): r.plain()["accuracy"] / 100 for r in runs}
    subsets = list(dict.fromkeys(r.subset for r in runs))
    shared = {s: [b for b in subsets if all((e, s, b) in accuracy for e in evaluators)] for s in used}
    strategy = max(used, key=lambda s: (len(shared[s]), s == "rules"))
    subsets = shared[strategy]
    if len(evaluators) * len(subsets) > 1:
        plots.append(
            {
                "kind": "heat",
                "title": f"Accuracy by subset, strategy {strategy}",
                "x": "evaluator",
                "y": "",
                "columns": [_short(e) for e in evaluators],
                "rows": [_tail(b) for b in subsets],
                "values": [[accuracy[e, strategy, b] for e in evaluators] for b in subsets],
            }
        )
    return plots


def _short(evaluator: str) -> str:
    return evaluator.split(" ")[0][:14]


def _tail(subset: str) -> str:
    name = subset.split("/")[-1]
    return name if len(name) <= 8 else name[:7] + "."
