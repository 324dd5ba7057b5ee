"""What each way to tune forgets for what it learns, on your own checkpoint and data: ways x learning rates x seeds at equal tokens.

A method that "forgets less" may only learn less. Ways to tune can be compared at the same loss on the new data alone:
    new, old = held-out losses on new and old data at the end of a run
    frontier(x) = full tuning's old loss where its new loss is x, on straight lines between the ends of its own sweep, seed by seed
    gap = old - frontier(new)
A way is below full tuning's frontier at a rate where its mean gap is negative by more than its standard deviation over the seeds, above
where it is positive by more; else the two are the same here. A point that learnt more or less than every run of full tuning has no
frontier beside it: it is shown and not counted. Full tuning is always among the ways, at rates between the given ones too.

The old data is a file, or text that the checkpoint writes itself before it is tuned. Ours; it is the product form of our benchmark
"forgetting". The frontier of full tuning is convex in most sweeps, so that straight lines between its points flatter the others a
little. Each finished run is kept with its training dynamics; a stopped sweep goes on with the next run, and a stopped run within itself.
"""

import itertools
import json
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, short
from modelwright.core.files import write_json
from modelwright.core.knobs import Data, Train, knob
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    runs: str | None = knob(None, "runs.json of a finished sweep; empty: train", path=True)
    data: Data = knob(Data(), "new data to learn from")
    old: Data = knob(Data(), "old data that must not be forgotten; empty: text that the checkpoint writes")
    ways: list[Any] = knob(["full", "hft", "migu", "lora"], "ways to tune: names, or a name with its settings such as {lora: {r: 4}}")
    lrs: list[float] = knob([1e-4, 3e-4, 1e-3, 3e-3], "peak learning rates")
    between: bool = knob(True, "full tuning also at the rates half-way between these, for a finer frontier")
    seeds: int = knob(3, "runs of each way and rate", low=1)
    held: int = knob(64, "rows of the new data that are held out, and of text that is written", low=1)
    train: Train = knob(Train(), "how each run is trained; its rate is that of the sweep")


@dataclass(frozen=True)
class Run:
    """One run: its way, rate and seed, the held-out losses at its evaluations, the first one before training."""

    way: str
    lr: float
    seed: int
    new: list[float]
    old: list[float]

    @property
    def end(self) -> tuple[float, float]:
        return self.new[-1], self.old[-1]


def frontier(knobs: Knobs, job: StepContext) -> EvalResult:
    """The picture of a recorded sweep, or of one that is trained here."""
    if knobs.runs:
        return found(read(Path(knobs.runs)))
    if job.source is None:
        raise UserError(
            "nothing to tune", "neither recorded runs nor a model was given", "give --base MODEL and --data FILE, or --runs FILE"
        )
    if not knobs.lrs or min(knobs.lrs) <= 0:
        raise UserError("lrs needs rates above 0", f"it is {knobs.lrs}", "give a list such as [1e-4, 1e-3]")
    return found(sweep(knobs, job))


# ---- runs --------------------------------------------------------------------------------------------------------------
def named(ways: list[Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Ways by the label they are shown under: name and settings. Full tuning comes first."""
    listed: dict[str, tuple[str, dict[str, Any]]] = {"full": ("full", {})}
    for item in ways:
        name, settings = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not isinstance(name, str) or not isinstance(settings or {}, dict):
            raise UserError(f"ways has {item!r}", "each is a way to tune, or one with its settings", "write ways: [hft, lora: {r: 4}]")
        words = ", ".join(f"{k} {v}" for k, v in (settings or {}).items())
        listed[f"{name}, {words}" if words else name] = (name, settings or {})
    return listed


def rates(knobs: Knobs, way: str) -> list[float]:
    """The rates of a way, ascending."""
    own = sorted(set(knobs.lrs))
    middle = [(a * b) ** 0.5 for a, b in itertools.pairwise(own)] if way == "full" and knobs.between else []
    return sorted([*own, *middle])


def sweep(knobs: Knobs, job: StepContext) -> list[Run]:
    """Train what is not trained yet; the runs are kept in runs.json of the step's folder."""
    from modelwright.judge.tasks import runs as trained  # torch

    ways = named(knobs.ways)
    wanted = [(way, lr, seed) for way in ways for lr in rates(knobs, way) for seed in range(knobs.seeds)]
    file = job.folder / "runs.json"
    done = read(file) if file.is_file() else []
    known = {(r.way, r.lr, r.seed): r for r in done}
    left = [w for w in wanted if w not in known]
    if left:
        assert job.technique
        made: Any = {way: (lambda n=name, s=settings: job.technique(n, s)) for way, (name, settings) in ways.items()}  # type: ignore[misc]
        teacher = trained.Teacher(job.source, knobs, made)
        for way, lr, seed in left:
            with job.progress.task(f"run {len(known) + 1} of {len(wanted)}: {way}, {lr:.2g}, seed {seed}", 1) as tick:
                folder = job.folder / f"run-{len(known)}"
                new, old = teacher.run(way, replace(knobs.train, lr=lr), seed + job.seed, folder, tick.to)
            known[way, lr, seed] = Run(way, lr, seed, new, old)
            _keep(folder, job.folder / "dynamics" / f"{len(known) - 1}-{ways[way][0]}-{lr:.3g}-{seed}.parquet")
            write_json(file, {"runs": [r.__dict__ for r in known.values()]})
            shutil.rmtree(folder, ignore_errors=True)
    return [known[w] for w in wanted]


def _keep(folder: Path, to: Path) -> None:
    """Put a finished run's dynamics aside; what it needed to resume goes with its folder."""
    if (folder / "dynamics.parquet").is_file():
        to.parent.mkdir(exist_ok=True)
        (folder / "dynamics.parquet").replace(to)


def read(file: Path) -> list[Run]:
    """Recorded runs: {runs: [{way, lr, seed, new: [...], old: [...]}]}. UserError for anything else."""
    how = 'write {"runs": [{"way": "full", "lr": 1e-3, "seed": 0, "new": [3.0, 2.5], "old": [1.0, 1.4]}]}'
    try:
        found = [
            Run(str(r["way"]), float(r["lr"]), int(r["seed"]), _losses(r["new"]), _losses(r["old"]))
            for r in json.loads(file.read_text(encoding="utf-8"))["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no runs", short(error), how) from None
    if not found:
        raise UserError(f"{file} holds no runs", "its list is empty", how)
    if not any(r.way == "full" for r in found):
        raise UserError(f"{file} has no run of full tuning", "the others are measured against it", "add runs of the way 'full'")
    return found


def _losses(values: Any) -> list[float]:
    losses = [float(v) for v in values]
    if not losses or not all(abs(v) < 1e9 for v in losses):
        raise ValueError("a run has no losses, or one that is not finite")
    return losses


# ---- the picture ---------------------------------------------------------------------------------------------------------
def below(ends: list[tuple[float, float]], new: float) -> tuple[float, bool]:
    """Full tuning's old loss at this new loss, and whether its sweep reaches so far; beyond it the nearest end's."""
    for (n0, o0), (n1, o1) in itertools.pairwise(sorted(ends)):
        if n0 <= new <= n1:
            return (o0 + (o1 - o0) * (new - n0) / (n1 - n0) if n1 > n0 else min(o0, o1)), True
    nearest = min(ends, key=lambda e: abs(e[0] - new))
    return nearest[1], nearest[0] == new


def compared(runs: list[Run]) -> list[dict[str, Any]]:
    """One line a way and rate: mean losses, gap to full tuning's frontier with its spread over the seeds, and the verdict."""
    ends = {s: [r.end for r in runs if r.way == "full" and r.seed == s] for s in {r.seed for r in runs}}
    if any(not e for e in ends.values()):
        raise UserError("full tuning has no run of some seed", "the frontier is taken seed by seed", "run every way with the same seeds")
    lines = []
    for way, lr in dict.fromkeys((r.way, r.lr) for r in runs):
        mine = [r for r in runs if (r.way, r.lr) == (way, lr)]
        marks = [below(ends[r.seed], r.end[0]) for r in mine]
        gaps = [r.end[1] - old for r, (old, _) in zip(mine, marks, strict=True)]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else None
        mean, inside = statistics.mean(gaps), all(ok for _, ok in marks)
        verdict = "the frontier" if way == "full" else "beyond" if not inside else _verdict(mean, spread)
        new, old = (statistics.mean(r.end[i] for r in mine) for i in (0, 1))
        lines.append({"way": way, "lr": lr, "new": new, "old": old, "gap": mean, "spread": spread, "seeds": len(mine), "verdict": verdict})
    return lines


def _verdict(mean: float, spread: float | None) -> str:
    if spread is None:
        return "one seed"
    return "below" if mean < -spread else "above" if mean > spread else "same"


def sentence(lines: list[dict[str, Any]]) -> str:
    """Which ways are below full tuning's frontier, in words."""
    said: dict[str, list[str]] = {"below": [], "above": [], "same": [], "none": []}
    for way in dict.fromkeys(x["way"] for x in lines if x["way"] != "full"):
        counts = {v: sum(x["verdict"] == v for x in lines if x["way"] == way) for v in ("below", "above", "same")}
        n = sum(counts.values())
        kind = "none" if not n else max(("same", "below", "above"), key=lambda v: counts[v])
        if kind != "none" and counts["below"] == counts["above"]:
            kind = "same"
        said[kind].append(f"{way} ({counts['below']} of {n} rates below, {counts['above']} above)" if n else way)
    parts = [
        f"{what}: {', '.join(said[kind])}"
        for kind, what in (
            ("below", "Below full tuning's frontier, so less is forgotten for what is learnt"),
            ("same", "The same as full tuning at another rate"),
            ("above", "Above it, so more is forgotten"),
            ("none", "Not to be told from these runs"),
        )
        if said[kind]
    ]
    return ". ".join(parts) + "." if parts else "Full tuning alone: there is nothing to compare."


def found(runs: list[Run]) -> EvalResult:
    """The table, the picture of new against old loss, and the sentence."""
    lines, start = compared(runs), runs[0]
    rows = [[x["way"], f"{x['lr']:.3g}", f"{x['new']:.3f}", f"{x['old']:.3f}", _gap(x), x["verdict"], x["seeds"]] for x in lines]
    ways = dict.fromkeys(x["way"] for x in lines)
    series = {way: sorted([x["new"], x["old"]] for x in lines if x["way"] == way) for way in ways}
    counts = {v: len({x["way"] for x in lines if x["verdict"] == v}) for v in ("below", "above")}
    metrics = {
        "before": {"new": start.new[0], "old": start.old[0]},
        "ways": {way: [{k: v for k, v in x.items() if k != "way"} for x in lines if x["way"] == way] for way in ways},
    }
    return EvalResult(
        metrics,
        text=sentence(lines),
        tiles=[(str(counts["below"]), "ways below the frontier", "at one rate or more"), (str(len(runs)), "runs", "")],
        tables=[
            {
                "title": f"Held-out loss in nats a token; before training new {start.new[0]:.3f}, old {start.old[0]:.3f}",
                "columns": ["way", "lr", "new loss", "old loss", "old loss above full tuning's at that new loss", "verdict", "seeds"],
                "rows": rows,
            }
        ],
        plots=[
            {
                "kind": "line",
                "title": "Old against new loss: lower left is better",
                "x": "new loss",
                "y": "old loss",
                "series": series,
            }
        ],
    )


def _gap(x: dict[str, Any]) -> str:
    return f"{x['gap']:+.3f}" + (f" ± {x['spread']:.3f}" if x["spread"] is not None else "")


METHOD = frontier
