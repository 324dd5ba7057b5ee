"""Benchmarks of reward models and judges from recorded scores: raw, calibrated, and against the baselines. No hub, no model.

For each reward model: accuracy with its sections and Spearman's correlation with the feature, both with 95 % bootstrap
intervals over prompts, for the raw scores and four corrections: the length penalty, RC-Mean, RC-LWR and the penalty
followed by RC-LWR (arXiv 2409.17407, see reward.calibrate). frac 1.0, ratio 4 and windows of 20 scores are the paper's
for RewardBench. Less correlation is what a calibration is for; more accuracy may follow or not.

Suites: rewardbench, judgebench, rmbench (pairs; see reward/suites/rewardbench.py, judgebench.py, rmbench.py for their files and
how each sums up) and alpacaeval (win rates; see reward/suites/alpaca.py). Where a subset of the published result needs the hub, a
file in the published layout takes its place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.numbers.stats import ranks
from modelwright.core.step import EvalResult, StepContext
from modelwright.reward.calibrate import Calibrator, cross_fit
from modelwright.reward.suites.alpaca import Settings, alpacaeval
from modelwright.reward.suites.common import value_of
from modelwright.reward.suites.judgebench import judgebench
from modelwright.reward.suites.rewardbench import heads as rewardbench_heads
from modelwright.reward.suites.rewardbench import rewardbench
from modelwright.reward.suites.rmbench import rmbench
from modelwright.reward.table.evidence import compare, plot, shown
from modelwright.reward.table.scores import Scores

NAMES = {"raw": "raw", "lwr": "RC-LWR", "mean": "RC-Mean", "penalty": "penalty", "penalty+lwr": "both"}


@dataclass(frozen=True)
class Knobs:
    suite: Literal["rewardbench", "judgebench", "rmbench", "alpacaeval"] = knob(help="the benchmark", argument=True)
    scores: str = knob(help="recorded scores or annotations: a file, or a folder of them", path=True)
    columns: dict[str, str] = knob({}, "role: column, where a file's columns have other names")
    texts: str | None = knob(None, "rewardbench, rmbench: the suite's own data, to count features from", path=True)
    features: list[str] = knob(["length"], "biases to remove, one after the other")
    frac: float | None = knob(None, "lwr: share of the scores under each line; empty: 1.0, alpacaeval 0.3", low=1e-6, high=1)
    ratio: float | None = knob(None, "mean: mean difference within a pair over half a window; empty: 4, alpacaeval 8", low=1e-6)
    penalty: float = knob(0.001, "length penalty, per unit of the first feature")
    compat: Literal["none", "official"] = knob("none", "official: the window and the look-up of the published code")
    folds: int = knob(0, "0: fit on the scores that are corrected, as the paper does; k: cross-fitted", low=0)
    leaderboard: str | None = knob(None, "alpacaeval: leaderboard csv to compare with", path=True)
    weights: str | None = knob(None, "alpacaeval: csv of the official length-controlled weights; empty: own fit", path=True)
    arena: list[str] = knob([], "alpacaeval: csv tables with an Arena column to correlate with", path=True)
    draws: int = knob(1000, "bootstrap resamples; fewer from 20,000 responses on", low=100)


def bench(knobs: Knobs, job: StepContext) -> EvalResult:
    """Accuracy and correlation of every reward model in the file, raw and corrected."""
    if not Path(knobs.scores).exists():
        raise UserError(f"no file at {knobs.scores}", how="check the path")
    if knobs.suite == "alpacaeval":
        return alpacaeval(Path(knobs.scores), knobs.columns, _alpaca(knobs), job)
    read = {"rewardbench": rewardbench, "judgebench": judgebench, "rmbench": rmbench}[knobs.suite]
    found = read(Path(knobs.scores), knobs.features, knobs.columns, knobs.texts)
    cases, shares, other = found if isinstance(found, tuple) else (found, {}, [])
    models: dict[str, dict[str, Any]] = {}
    plots = []
    with job.progress.task("calibrate", len(cases)) as tick:
        for s, heads in cases:
            columns = corrections(s, knobs, job.seed)
            models[s.name] = compare(columns, s, heads, knobs.draws, job.seed)
            plots.append(
                plot(s, {NAMES[n]: columns[n] for n in ("raw", "lwr")}, knobs.features[0], f"{s.name}: score along {knobs.features[0]}")
            )
            tick(1)
    for model, share in shares.items():
        values = {n: value_of(h, share) for n, h in rewardbench_heads(list(share)).items()}
        models[model] = {"raw": {"accuracy": values.pop("accuracy"), "sections": values}}
    return _finding(knobs, models, plots[:4], {s.name: len(s.better) for s, _ in cases}, other)


def _alpaca(knobs: Knobs) -> Settings:
    return Settings(
        leaderboard=knobs.leaderboard,
        weights=knobs.weights,
        arena=tuple(knobs.arena),
        frac=knobs.frac or Settings.frac,
        ratio=knobs.ratio or Settings.ratio,
        penalty=knobs.penalty,
        compat=knobs.compat,
        draws=knobs.draws,
    )


def corrections(s: Scores, knobs: Knobs, seed: int) -> dict[str, np.ndarray]:
    """Scores (n,) by name of the correction."""
    names = tuple(knobs.features)

    def corrected(method: Any, score: np.ndarray, of: tuple[str, ...] = names) -> np.ndarray:
        c = Calibrator(of, method, frac=knobs.frac or 1.0, ratio=knobs.ratio or 4.0, penalty=knobs.penalty, compat=knobs.compat)
        t = Scores(**{**vars(s), "score": score})
        return cross_fit(c, t, knobs.folds, seed) if knobs.folds else c.fit(score, s.features, s.group).apply(score, s.features, s.group)

    penalised = corrected("penalty", s.score, names[:1])
    lwr = corrected("lwr", s.score)
    return {
        "raw": s.score,
        "lwr": lwr,
        "mean": corrected("mean", s.score),
        "penalty": penalised,
        "penalty+lwr": corrected("lwr", penalised),
    }


def _finding(
    knobs: Knobs, models: dict[str, dict[str, Any]], plots: list[dict[str, Any]], counts: dict[str, int], other: list[str]
) -> EvalResult:
    both = [m for m, by in models.items() if "lwr" in by]
    sections = list(dict.fromkeys(n for by in models.values() for n in by["raw"].get("sections", {})))
    kinds = list(NAMES) if both else ["raw"]
    rows = [[m, *(f"{by[k]['accuracy']:.2f}" if k in by else "" for k in kinds)] for m, by in models.items()]
    tables = [{"title": "Accuracy, %", "columns": ["reward model", *(NAMES[k] for k in kinds)], "rows": rows}]
    for m in both[:5]:
        rows = [_line(NAMES[k], r, knobs.features) for k, r in models[m].items()]
        columns = ["scores", "accuracy, %", "change", *(f"Spearman, {f}" for f in knobs.features)]
        tables.append({"title": f"{m}, with 95 % intervals", "columns": columns, "rows": rows})
    if sections:
        rows = [
            [m.split("/")[-1] if k == "raw" else f"  {NAMES[k]}", *(f"{by[k]['sections'].get(n, np.nan):.2f}" for n in sections)]
            for m, by in models.items()
            for k in ("raw", "lwr")
            if k in by
        ]
        tables.append({"title": "Sections, %", "columns": ["reward model", *sections], "rows": rows})
    if len(both) > 1:
        place = {k: ranks(-np.array([models[m][k]["accuracy"] for m in both])) for k in ("raw", "lwr")}
        for i, m in enumerate(both):
            models[m]["rank"] = {k: float(v[i]) for k, v in place.items()}
        order = sorted(both, key=lambda m: models[m]["rank"]["raw"])
        rows = [[m, *(f"{models[m]['rank'][k]:g}" for k in place)] for m in order]
        tables.append({"title": "Rank by accuracy", "columns": ["reward model", "raw", "RC-LWR"], "rows": rows})
    if both:
        series = {NAMES[k]: [models[m][k]["accuracy"] for m in both] for k in ("raw", "lwr", "mean", "penalty")}
        plots = [{"kind": "bars", "title": "Accuracy, %", "y": "%", "groups": [m[-20:] for m in both], "series": series}, *plots]
    metrics = {"suite": knobs.suite, "comparisons": counts, "models": models}
    return EvalResult(
        metrics,
        _sentence(knobs.features[0], models, both),
        tables=tables,
        plots=plots,
        facts={"not read": ", ".join(other)} if other else {},
    )


def _line(name: str, row: dict[str, Any], features: list[str]) -> list[str]:
    change = shown(row["change"], row["change_interval"]) if name != "raw" else ""
    correlations = [shown(row["spearman"][f], row["spearman_interval"][f], 3) for f in features]
    return [name, shown(row["accuracy"], row["accuracy_interval"]), change, *correlations]


def _sentence(feature: str, models: dict[str, dict[str, Any]], both: list[str]) -> str:
    if not both:
        return f"{len(models)} models from the accuracy of their subsets; without scores nothing can be calibrated."
    worst = {k: max(abs(models[m][k]["spearman"][feature]) for m in both) for k in ("raw", "lwr")}
    up = sum(models[m]["lwr"]["change"] > 0 for m in both)
    sure = sum(models[m]["lwr"]["change_interval"][0] > 0 or models[m]["lwr"]["change_interval"][1] < 0 for m in both)
    return (
        f"RC-LWR: largest |Spearman(score, {feature})| {worst['raw']:.3f} -> {worst['lwr']:.3f}; "
        f"accuracy rises for {up} of {len(both)} reward models, clearly changed for {sure}."
    )


METHOD = bench
