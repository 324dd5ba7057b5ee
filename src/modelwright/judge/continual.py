"""Continual learning in one definition: accuracy matrices, and a runner that trains a sequence of tasks and fills one.

A[t, i] is the accuracy on task i after stage t, T stages in the order of the tasks (GEM, 1706.08840; TRACE, 2310.06762):
    AA  = mean_i A[T, i]                      BWT = mean_{i<T} (A[T, i] - A[i, i])
    FWT = mean_{i>1} (A[i-1, i] - A[0, i])    LA  = mean_i A[i, i]          OP_t = mean_{i<=t} A[t, i]
A[0] is the untrained model's row, where it was measured. LA, the learning accuracy, belongs beside BWT: what learns nothing
forgets nothing. TRACE divides BWT by T instead of T - 1 (bwt_trace). A measure whose entries are missing is None.

The runner is ours: labels are words scored within the task's own label set by likelihood; any way to tune trains each stage.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, short
from modelwright.core.files import write_json
from modelwright.core.knobs import Train, knob
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    matrix: str | None = knob(None, "json file with recorded accuracies; empty: train the tasks", path=True)
    tasks: list[str] = knob([], "json files in order, each {train, test: [{sentence, label}], labels}", path=True)
    tune: str = knob("full", "way to tune, such as full, hft or migu")
    settings: dict[str, Any] = knob({}, "its own settings")
    train: Train = knob(Train(), "how each task is trained")
    limit: int = knob(200, "test examples per task, at most", low=1)
    untrained: bool = knob(True, "measure the model before training too, which FWT needs")


def continual(knobs: Knobs, job: StepContext) -> EvalResult:
    """Measures of every run in a file, or of one run trained here."""
    if knobs.matrix:
        return found(read(Path(knobs.matrix)))
    if job.source is None:
        raise UserError("nothing to measure", "neither a matrix nor a model was given", "give --matrix FILE, or --base MODEL and --tasks")
    if len(knobs.tasks) < 2:
        raise UserError(f"{len(knobs.tasks)} task was given", "a sequence has at least two", "give more files as tasks")
    return found({knobs.tune: train_sequence(knobs, job)})


@dataclass
class Run:
    """Accuracies of one sequence: tasks in order, A[t][i] in percent or None, and the untrained row."""

    tasks: list[str]
    a: list[list[float | None]]
    start: list[float | None] | None = None
    cut: list[dict[str, int]] | None = None  # sentences that lost their end at the context, by task: train, test

    def measures(self) -> dict[str, Any]:
        """AA, BWT, BWT as in TRACE, FWT, LA and OP by stage; None where an entry is missing."""
        n, last = len(self.tasks), self.a[-1]
        learnt = [self.a[i][i] for i in range(n)]
        lost = [_less(last[i], learnt[i]) for i in range(n - 1)]
        ahead = [_less(self.a[i - 1][i], self.start[i] if self.start else None) for i in range(1, n)]
        bwt = _mean(lost)
        return {
            "AA": _mean(last),
            "BWT": bwt,
            "BWT_TRACE": None if bwt is None else bwt * (n - 1) / n,
            "FWT": _mean(ahead),
            "LA": _mean(learnt),
            "OP": [_mean(self.a[t][: t + 1]) for t in range(n)],
        }


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: list[float | None]) -> float | None:
    return None if not values or None in values else sum(values) / len(values)  # type: ignore[arg-type]


def read(file: Path) -> dict[str, Run]:
    """Runs by name. The file holds runs {name: run}, or one: a run is {tasks, matrix, untrained} or {stage: {task, per}}."""
    raw = _json(file)
    if isinstance(raw, dict) and "matrix" in raw:
        raw = {file.stem: raw}
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{file} holds no runs", "an object of runs by name is needed")
    return {name: _run(name, r) for name, r in raw.items()}


def _json(file: Path) -> Any:
    """What a json file holds. Raises UserError where it does not parse, or where a key stands twice: one would be lost."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, n in Counter(key for key, _ in pairs).items():
            if n > 1:
                raise ValueError(f"the key {key!r} stands {n} times in one object")
        return dict(pairs)

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} does not parse", short(error)) from None


def _run(name: str, raw: Any) -> Run:
    try:
        tasks, rows, untrained = _parts(raw)
        n = len(tasks)
        if len(rows) != n or any(len(row) != n for row in rows):
            raise ValueError(f"{len(rows)} stages and {n} tasks, or a row of another length")
        if untrained is not None and len(untrained) != n:
            raise ValueError(f"{len(untrained)} accuracies of the untrained model and {n} tasks")
        a = [[_accuracy(v) for v in row] for row in rows]
        start = None if untrained is None else [_accuracy(v) for v in untrained]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"run '{name}' is no accuracy matrix", short(error), "write {tasks: [...], matrix: [[...], ...]}") from None
    if n < 2:
        raise UserError(f"run '{name}' has {n} task", "a sequence has at least two", "give more tasks")
    return Run(tasks, a, start)


def _parts(raw: Any) -> tuple[list[str], list[list[Any]], list[Any] | None]:
    """Tasks, rows of accuracies and the untrained row of a recorded run, as lists."""
    if "matrix" in raw:
        tasks, rows, untrained = raw["tasks"], raw["matrix"], raw.get("untrained") or None
    else:
        stages = [raw[k] for k in sorted(raw, key=int)]
        tasks, untrained = [s["task"] for s in stages], None
        rows = [[(s.get("per") or {}).get(t) for t in tasks] for s in stages]
    lists = [tasks, rows, *rows, *([] if untrained is None else [untrained])]
    if not all(isinstance(part, list) for part in lists):  # a text would be read letter by letter
        raise TypeError("a list is needed for the tasks, for the matrix and for each of its rows")
    if not all(isinstance(t, str) for t in tasks):
        raise TypeError("tasks have names")
    return tasks, rows, untrained


def _accuracy(value: Any) -> float | None:
    """An accuracy in percent, or None where it was not measured."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        shown = f"{float(value)}" if type(value) in (int, float) and abs(value) < 1e6 else repr(value)[:40]
        raise ValueError(f"{shown} is no accuracy in percent")
    return float(value)


def found(runs: dict[str, Run]) -> EvalResult:
    """Measures as metrics, tables and pictures."""
    metrics = {name: r.measures() | {"tasks": r.tasks, "matrix": r.a, "untrained": r.start, "cut": r.cut} for name, r in runs.items()}
    rows = [[n, *(_show(m[k]) for k in ("AA", "BWT", "FWT", "LA"))] for n, m in metrics.items()]
    plots: list[dict[str, Any]] = [
        {
            "kind": "heat",
            "title": f"{name}: accuracy after each stage",
            "x": "task",
            "y": "",
            "columns": r.tasks,
            "rows": [f"after {t}" for t in r.tasks],
            "values": r.a,
        }
        for name, r in runs.items()
    ]
    if len(runs) > 1:
        full = {n: m for n, m in metrics.items() if m["AA"] is not None}
        bars = {"AA": [m["AA"] for m in full.values()], "LA": [m["LA"] for m in full.values()]}
        plots.insert(
            0, {"kind": "bars", "title": "After the last task, and just learnt", "y": "accuracy, %", "groups": [*full], "series": bars}
        )
    one = next(iter(metrics.values()))
    tiles = [
        (_show(one[k]), k, what) for k, what in (("AA", "average accuracy"), ("BWT", "backward transfer"), ("LA", "learning accuracy"))
    ]
    tables: list[dict[str, Any]] = [{"title": "Percent", "columns": ["run", "AA", "BWT", "FWT", "LA"], "rows": rows}]
    cut = [[name, t, c["train"], c["test"]] for name, r in runs.items() for t, c in zip(r.tasks, r.cut or [], strict=False)]
    if any(train or test for _, _, train, test in cut):
        tables.append({"title": "Sentences cut at the context", "columns": ["run", "task", "train", "test"], "rows": cut})
    return EvalResult(
        metrics,
        text="Average accuracy at the end, and how much of what was learnt is still there.",
        tiles=tiles if len(runs) == 1 else [],
        tables=tables,
        plots=plots,
    )


def _show(v: float | None) -> str:
    return "unknown" if v is None else f"{v:.2f}"


# ---- training a sequence ---------------------------------------------------------------------------------------------
@dataclass
class Task:
    """A labelled classification task."""

    name: str
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    labels: list[str]


def read_task(file: Path, limit: int) -> Task:
    """A task file; UserError when a split is missing or a label is unknown."""
    raw = _json(file)
    for split in ("train", "test", "labels"):
        if not isinstance(raw, dict) or not raw.get(split):
            raise UserError(f"task {file} has no '{split}'", "train, test and labels are needed")
    if not all(isinstance(x, str) for x in raw["labels"]) or len(set(raw["labels"])) < len(raw["labels"]):
        raise UserError(f"task {file} has wrong labels", "they are different texts", "write a list of words")
    task = Task(file.stem, raw["train"], raw["test"][:limit], list(raw["labels"]))
    for row in (*task.train, *task.test):
        if not isinstance(row, dict) or row.get("label") not in task.labels or not isinstance(row.get("sentence"), str):
            raise UserError(f"task {file} has a row {str(row)[:80]}", "each needs a sentence and one of the task's labels")
    return task


def train_sequence(knobs: Knobs, job: StepContext) -> Run:
    """Train the tasks one after another, measure all after each. A stopped run goes on with the next stage."""
    from modelwright.judge.tasks import sequence  # torch

    tasks = [read_task(Path(t), knobs.limit) for t in knobs.tasks]
    assert job.technique
    state = job.folder / "stages.json"
    done = json.loads(state.read_text()) if state.is_file() else {"a": [], "start": None, "cut": []}
    if len(done["a"]) < len(tasks):
        learner = sequence.Learner(job.source, knobs.train, job.folder, len(done["a"]))
        learner.refuse(job.technique(knobs.tune, knobs.settings), job.source)
        if knobs.untrained and done["start"] is None:
            done["start"] = [learner.accuracy(t) for t in tasks]
        for i in range(len(done["a"]), len(tasks)):
            with job.progress.task(f"task {i + 1} of {len(tasks)}: {tasks[i].name}", 1) as tick:
                cut = learner.learn(tasks[i], i, job.technique(knobs.tune, knobs.settings), job.seed, tick.to)
            done["a"].append([learner.accuracy(t) for t in tasks])
            done["cut"].append({"train": cut, "test": learner.cut(tasks[i])})
            write_json(state, done)
            learner.tidy(i)
        learner.tidy(len(tasks))
    return Run([t.name for t in tasks], done["a"], done["start"], done["cut"])


METHOD = continual
