"""Runs a recipe: each step in a folder of its own, results published in one rename, a stopped run taken up where it was.

While it runs everything lies in `TO.run/`; at the end the last result becomes `TO`, with the report, the lineage and the
steps' small artifacts inside it. A step that only measures needs no `TO`: it is run, printed and forgotten.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.job import Finding, Job
from modelwright.core.knobs import Data, paths, plain
from modelwright.core.lineage import disk_errors, fingerprint, fingerprint_path, versions, write_json, write_lineage
from modelwright.core.progress import Progress, Silent
from modelwright.core.report import Report
from modelwright.recipe import Recipe, Step, check, parse


@dataclass
class Result:
    """What a run gives: the folder, one dictionary per step, and the report."""

    to: Path | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(""))

    @property
    def certificate(self) -> dict[str, Any] | None:
        return next((s["certificate"] for s in reversed(self.steps) if s.get("certificate")), None)

    def plain(self) -> dict[str, Any]:
        """For --json: the last certificate and its sizes stand at the top."""
        c = self.certificate or {}
        top: dict[str, Any] = {k: c[k] for k in ("params_total", "params_active", "loads_in") if k in c}
        if metrics := next((s["metrics"] for s in reversed(self.steps) if "metrics" in s), None):
            top["metrics"] = metrics
        return {"to": self.to and str(self.to), **top, "certificate": c or None, "steps": self.steps}


@dataclass
class Run:
    """A recipe under way: where it works, and the artifacts so far."""

    recipe: Recipe
    work: Path
    progress: Progress
    checkpoint: Path | None = None
    dataset: Path | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    base_fingerprint: str | None = None
    processes: int = 1  # that train together
    tuned: int = 0  # tuning steps so far, earlier runs included


def run(
    name: str,
    *,
    to: str | Path | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    save: dict[str, Any] | None = None,
    **knobs: Any,
) -> Result:
    """One step as one call: run("reshape.upcycle", base="X", to="Y", experts=4). Raises UserError for bad input.

    Without `to`, a step that only measures leaves nothing on disk; any other writes to out/NAME.
    """
    raw = {
        "name": name,
        "seed": seed,
        "base": str(base) if base else None,
        "steps": [{name: _raw(knobs)}],
        "save": {**(save or {}), "to": to and str(to)},
    }
    recipe = parse(raw, name=name)
    return run_recipe(recipe, progress, keep=to is not None or bool(recipe.steps[0].entry.gives))


def _raw(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {k: _raw(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def run_recipe(recipe: Recipe, progress: Progress | None = None, keep: bool = True, processes: int = 1) -> Result:
    """Run all steps. A recipe whose result exists already is not run again; without `keep` nothing stays on disk.

    With several `processes`, training steps run under torchrun; everything else stays in this one.
    """
    check(recipe)
    if not keep:
        with tempfile.TemporaryDirectory(prefix="modelwright-") as folder:
            return _run_steps(Run(recipe, Path(folder), progress or Silent(), processes=processes), None)
    to = Path(recipe.save.to or os.path.join("out", recipe.name))
    work = to.with_name(to.name + ".run")
    if done := _finished(recipe, to):
        shutil.rmtree(work, ignore_errors=True)
        return done
    if os.path.exists(to):  # unlike Path.exists, false for a name too long
        raise UserError(f"{to} exists already", "nothing is overwritten", "choose another folder or remove it")
    r = Run(recipe, work, progress or Silent(), processes=processes)
    with disk_errors(r.work):
        r.work.mkdir(parents=True, exist_ok=True)
        lock = _lock(work)
    try:
        with disk_errors(r.work):
            return _run_steps(r, to)
    except UserError:
        if not any(r.work.rglob("checkpoint-*")):  # nothing worth resuming: leave no trace
            shutil.rmtree(r.work, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(work: Path) -> int:
    """Keep a second run out; the system lets go when the process ends, however it ends."""
    fd = os.open(work / "process", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.read(fd, 20).decode().strip()
        os.close(fd)
        raise UserError(f"{work} is being written by process {other}", "one run at a time", "wait for it or stop it") from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _run_steps(r: Run, to: Path | None) -> Result:
    recipe, result = r.recipe, Result(to, report=Report(r.recipe.name))
    if recipe.base:
        from modelwright.core.checkpoint import Checkpoint

        source = Checkpoint(recipe.base)
        r.checkpoint = source.folder
        r.history, r.base_fingerprint = (source.lineage or {}).get("steps", []), source.fingerprint()
        r.tuned = sum(s["step"].startswith("tune.") for s in r.history)
    key = recipe.base or ""
    for i, step in enumerate(recipe.steps):
        inputs = _inputs(step, r)
        text = json.dumps([key, step.entry.name, plain(step.knobs), recipe.seed, inputs], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()
        folder = r.work / f"{i}-{step.entry.name}"
        if (folder / "done.json").is_file() and json.loads((folder / "done.json").read_text())["key"] == key:
            entry = json.loads((folder / "done.json").read_text())
        else:
            if (folder / "key").is_file() and (folder / "key").read_text() != key:
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            (folder / "key").write_text(key)
            began = time.perf_counter()
            entry = _driver(step.entry.family)(r, step, folder)
            entry |= {
                "step": step.entry.name,
                "key": key,
                "seed": recipe.seed,
                "knobs": plain(step.knobs),
                "inputs": inputs,
                "seconds": round(time.perf_counter() - began, 2),
            }
            write_json(folder / "done.json", entry)
        for state in folder.glob("checkpoint-*"):  # kept until the step is done, so that a stop never costs training
            shutil.rmtree(state)
        if "checkpoint" in step.entry.gives:
            r.checkpoint = folder / "result"
        r.tuned += step.entry.family == "tune"
        if "dataset" in step.entry.gives:
            r.dataset = folder / "dataset.jsonl"
        result.steps.append(entry)
        result.report.step(entry)
    if to:
        _publish(r, result, to)
    return result


def _driver(family: str) -> Callable[[Run, Step, Path], dict[str, Any]]:
    if family in _LIGHT:
        return _LIGHT[family]
    from modelwright import drivers  # torch and transformers

    drivers.calm()
    return drivers.OF[family]


def with_dataset(r: Run, knobs: Any) -> Any:
    """A step's knobs, reading what an earlier step curated where they name no data."""
    if isinstance(getattr(knobs, "data", None), Data) and not knobs.data.path and r.dataset:
        return replace(knobs, data=replace(knobs.data, path=str(r.dataset), column=knobs.data.column or "text"))
    return knobs


def _curate(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    with r.progress.task(step.entry.name):
        return {"facts": registry.load(step.entry)(step.knobs, folder, r.recipe.seed)}


def _measure(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    source = None
    if r.checkpoint and "checkpoint" in (*step.entry.takes, *step.entry.may_take):
        from modelwright.core.checkpoint import Checkpoint
        from modelwright.drivers import calm

        calm()
        source = Checkpoint(r.checkpoint)
    job = Job(folder, r.recipe.seed, r.progress, source, registry.techniques_named)
    found: Finding = registry.load(step.entry)(with_dataset(r, step.knobs), job)
    return {f.name: getattr(found, f.name) for f in fields(found)}


_LIGHT = {"curate": _curate, "reward": _measure, "cache": _measure, "judge": _measure, "inspect": _measure}


def _inputs(step: Step, r: Run) -> dict[str, str]:
    """Fingerprints of everything that a step reads."""
    found = {str(p): fingerprint_path(p) for p in paths(step.knobs)}
    if r.checkpoint and "checkpoint" in (*step.entry.takes, *step.entry.may_take):
        from modelwright.core.checkpoint import Checkpoint

        found["checkpoint"] = Checkpoint(r.checkpoint).fingerprint()
    if r.dataset and "dataset" in (*step.entry.takes, *step.entry.may_take):
        found["dataset"] = fingerprint(r.dataset)
    return found


def _publish(r: Run, result: Result, to: Path) -> None:
    recipe, last = r.recipe, r.work / f"{len(r.recipe.steps) - 1}-{r.recipe.steps[-1].entry.name}"
    lineage = {
        "modelwright": versions()["modelwright"],
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe": _identity(recipe),
        "recipe_key": result.steps[-1]["key"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base": recipe.base,
        "base_fingerprint": r.base_fingerprint,
        "steps": r.history + [{k: v for k, v in s.items() if k != "key"} for s in result.steps],
        "versions": versions(),
    }
    folder = r.checkpoint if r.checkpoint and r.checkpoint.is_relative_to(r.work) else last
    small = r.work / "steps"
    shutil.rmtree(small, ignore_errors=True)
    for i, step in enumerate(recipe.steps):
        (small / f"{i}-{step.entry.name}").mkdir(parents=True)
        for name in ("done.json", "dynamics.parquet", "adapter"):
            source = r.work / f"{i}-{step.entry.name}" / name
            if source.is_dir():
                shutil.copytree(source, small / f"{i}-{step.entry.name}" / name)
            elif source.exists():
                shutil.copyfile(source, small / f"{i}-{step.entry.name}" / name)
    shutil.rmtree(folder / "steps", ignore_errors=True)
    os.rename(small, folder / "steps")
    write_lineage(folder, lineage)
    if result.certificate and r.checkpoint:
        from modelwright.core.certificate import Certificate
        from modelwright.core.writer import write_card

        rows = [(k, f"{a} -> {b}" if a and a != b else b) for k, a, b in Certificate(**result.certificate).rows()]
        write_card(folder, recipe.name, recipe.base or "none", result.steps, rows, result.certificate["loads_in"])
    result.report.facts |= {"result": str(to), "seed": recipe.seed, **lineage["versions"]}
    (folder / "report.html").write_text(result.report.html(), encoding="utf-8")
    write_json(folder / "report.json", result.plain())
    for name in ("key", "done.json"):
        (folder / name).unlink(missing_ok=True)
    os.rename(folder, to)
    shutil.rmtree(r.work, ignore_errors=True)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the place of its result: what makes two runs the same run."""
    whole = recipe.plain()
    return whole | {"save": {k: v for k, v in whole["save"].items() if k != "to"}}


def _finished(recipe: Recipe, to: Path) -> Result | None:
    try:
        if json.loads((to / "modelwright.json").read_text())["recipe"] != json.loads(json.dumps(_identity(recipe))):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    result = Result(to, json.loads((to / "report.json").read_text())["steps"], Report(recipe.name))
    for entry in result.steps:
        result.report.step(entry)
    return result
