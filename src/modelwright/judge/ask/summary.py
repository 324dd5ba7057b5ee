"""What judged pairs say: averages as LLMBar reports them, tests between strategies, tables and pictures."""

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np

from modelwright.core.step import EvalResult
from modelwright.judge.ask.prompts import STRATEGIES
from modelwright.judge.ask.verdict import ByPlace, Measured, differ, mean_interval, measure

NATURAL = "LLMBar/Natural"
ADVERSARIAL = tuple(f"LLMBar/Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual"))


@dataclass
class Run:
    """One evaluator with one strategy on one subset: verdicts (2, N), both orders in the order of the data; labels (N,).
    official: two unparsed verdicts agree, as in the published figures."""

    evaluator: str
    strategy: str
    subset: str
    verdicts: np.ndarray
    labels: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)
    official: bool = False

    def measured(self) -> Measured:
        return measure(self.verdicts, self.labels, self.official)

    def plain(self) -> dict[str, Any]:
        names = {"evaluator": self.evaluator, "strategy": self.strategy, "subset": self.subset}
        return names | self.measured() | self.extra


class Mean(TypedDict):
    """A plain mean over subsets, in percent."""

    accuracy: float
    agreement: float
    unparsed: float
    by_place: ByPlace
    accuracy_interval: list[float]


class Row(TypedDict):
    """One evaluator with one strategy. natural and adversarial only where the paper's five subsets are all there."""

    evaluator: str
    strategy: str
    subsets: int
    overall: Mean
    natural: NotRequired[Mean]
    adversarial: NotRequired[Mean]
    p_against_first: NotRequired[float]


def averages(runs: list[Run]) -> list[Row]:
    """One row per evaluator and strategy: Natural, Adversarial (plain mean of its four subsets) and overall (plain mean of the
    five; of whatever subsets there are, where it is not those five), with p against the evaluator's first strategy (see `differ`)."""
    groups: dict[tuple[str, str], dict[str, Run]] = {}
    for run in sorted(runs, key=lambda r: list(STRATEGIES).index(r.strategy)):
        groups.setdefault((run.evaluator, run.strategy), {})[run.subset] = run
    first: dict[str, dict[str, Run]] = {}  # evaluator -> the runs of its first strategy
    rows: list[Row] = []
    for (evaluator, strategy), of in sorted(groups.items(), key=lambda g: g[0][0]):
        whole = {NATURAL, *ADVERSARIAL} <= set(of)
        over = {s: of[s] for s in (NATURAL, *ADVERSARIAL)} if whole else of
        row: Row = {"evaluator": evaluator, "strategy": strategy, "subsets": len(over), "overall": _mean(list(over.values()))}
        if whole:
            row["natural"] = _mean([of[NATURAL]])
            row["adversarial"] = _mean([of[s] for s in ADVERSARIAL])
        base = first.setdefault(evaluator, of)
        if base is not of and set(base) >= set(over):
            a, b = (np.concatenate([runs_of[s].verdicts for s in over], axis=1) for runs_of in (base, over))
            row["p_against_first"] = differ(a, b, np.concatenate([r.labels for r in over.values()]))
        rows.append(row)
    return rows


def _mean(runs: list[Run]) -> Mean:
    parts = [r.measured() for r in runs]
    return {
        "accuracy": float(np.mean([m["accuracy"] for m in parts])),
        "agreement": float(np.mean([m["agreement"] for m in parts])),
        "unparsed": float(np.mean([m["unparsed"] for m in parts])),
        "by_place": {
            "first": float(np.mean([m["by_place"]["first"] for m in parts])),
            "second": float(np.mean([m["by_place"]["second"] for m in parts])),
        },
        "accuracy_interval": mean_interval(parts),
    }


def finding(runs: list[Run]) -> EvalResult:
    """Metrics, a table per evaluator and the pictures."""
    rows = averages(runs)
    tables = [
        _table(evaluator, [r for r in rows if r["evaluator"] == evaluator]) for evaluator in dict.fromkeys(r["evaluator"] for r in rows)
    ]
    return EvalResult({"runs": [r.plain() for r in runs], "averages": rows}, tables=tables, plots=_plots(runs, rows))


def _table(evaluator: str, rows: list[Row]) -> dict[str, Any]:
    """Accuracy and agreement of every strategy of one evaluator."""
    whole = all("natural" in r and "adversarial" in r for r in rows)
    lines = []
    for r in rows:
        cells = []
        for part in (r["natural"], r["adversarial"]) if whole else ():
            cells += [f"{part['accuracy']:.1f}", f"{part['agreement']:.1f}"]
        of = r["overall"]
        low, high = of["accuracy_interval"]
        cells += [f"{of['accuracy']:.1f}", f"{low:.1f} to {high:.1f}", f"{of['agreement']:.1f}", f"{of['unparsed']:.1f}"]
        p = f"{r['p_against_first']:.1g}" if "p_against_first" in r else ""
        lines.append([r["strategy"], *cells, p])
    heads = ["Natural", "agr.", "Advers.", "agr."] if whole else []
    columns = ["strategy", *heads, "all", "95 %", "agr.", "unp.", "p"]
    title = f"{_short(evaluator)}: accuracy and agreement of both orders, percent; p against {rows[0]['strategy']}"
    return {"title": title, "columns": columns, "rows": lines}


def _plots(runs: list[Run], rows: list[Row]) -> list[dict[str, Any]]:
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
