"""Runs a recipe: each step in a folder of its own, results published in one rename, a stopped run taken up where it was.

While it runs everything lies in `TO.run/`; at the end the last result becomes `TO`, with the report, the lineage and the
steps' small artifacts inside it. A step that only measures needs no `TO`: it is run, printed and forgotten.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, shown
from modelwright.core.files import disk_errors, fingerprint, fingerprint_path, finite, write_json
from modelwright.core.knobs import paths, plain
from modelwright.core.model.lineage import LINEAGE, versions, write_lineage
from modelwright.core.report.page import Report
from modelwright.core.report.progress import Progress, Silent
from modelwright.runner.context import Result, Run
from modelwright.runner.processes import follows, launched
from modelwright.runner.recipe import Recipe, Step, check, parse

_RESUMES = ("optimizer*", "scheduler*", "rng_state*", "techniques*", "trainer_state*")  # of a state, to go on from it
_WORTH = ("*/checkpoint-*", "*/done.json", "*/answers.jsonl")  # states, finished steps, answers that were paid for
_WORKING = ("key", "settings.json", "done.json")  # of a step's folder, not of a result
_NOTES = (*_WORKING, "report.json", LINEAGE)  # written after the files of a result are counted
_MARK = "process"  # the file that makes a working folder ours; it holds the number of the process that works there


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
    if follows():
        from modelwright.runner.worker import follow

        follow()
    check(recipe)
    if launched() > 1:
        with _dismissed():
            return _run(recipe, progress, keep, launched())
    return _run(recipe, progress, keep, processes)


@contextlib.contextmanager
def _dismissed() -> Iterator[None]:
    """Let the processes that an outside launcher started go when the run ends, however it ends."""
    try:
        yield
    finally:
        from modelwright.core.train import dist

        dist.start(launched())
        dist.broadcast(None)
        dist.barrier()


def _run(recipe: Recipe, progress: Progress | None, keep: bool, processes: int) -> Result:
    if not keep:
        with tempfile.TemporaryDirectory(prefix="modelwright-") as folder:
            return _run_steps(Run(recipe, Path(folder), progress or Silent(), processes=processes), None)
    to = Path(recipe.save.to or os.path.join("out", recipe.name))
    work = to.with_name(to.name + ".run")
    if done := _finished(recipe, to):
        _remove_own(work)
        return done
    if os.path.exists(to):  # unlike Path.exists, false for a name too long
        raise UserError(f"{to} exists already", "nothing is overwritten", "choose another folder or remove it")
    if os.path.exists(work) and not os.path.isfile(work / _MARK):
        raise UserError(
            f"{work} exists and is not ours", "a run works there until its result is whole", "rename it, or choose another folder"
        )
    r = Run(recipe, work, progress or Silent(), processes=processes)
    with disk_errors(r.work):
        r.work.mkdir(parents=True, exist_ok=True)
        lock = _lock(work)
    try:
        with disk_errors(r.work):
            return _run_steps(r, to)
    except UserError:
        if not any(found for what in _WORTH for found in r.work.glob(what)):  # nothing worth resuming: leave no trace
            _remove_own(work)
        raise
    finally:
        os.close(lock)


def _remove_own(work: Path) -> None:
    """Remove a working folder, if it is one of ours."""
    if os.path.isfile(work / _MARK):
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _MARK:
                path.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)  # the mark last: a folder half removed is still ours
    else:
        with contextlib.suppress(OSError):
            work.rmdir()  # empty, or it stays


def _lock(work: Path) -> int:
    """Keep a second run out; the system lets go when the process ends, however it ends."""
    fd = os.open(work / _MARK, os.O_RDWR | os.O_CREAT, 0o644)
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
        from modelwright.core.model.checkpoint import Checkpoint

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
        if entry := _done(folder, key, step):
            pass
        else:
            _take_up(folder, key, json.loads(text), recipe.save.discard)
            began = time.perf_counter()
            entry = _driver(step)(r, step, folder)
            entry |= {
                "step": step.entry.name,
                "key": key,
                "seed": recipe.seed,
                "knobs": plain(step.knobs),
                "inputs": inputs,
                "seconds": round(time.perf_counter() - began, 2),
            }
            write_json(folder / "done.json", entry)
        keep = getattr(getattr(step.knobs, "train", None), "keep", 0)
        for state in sorted(folder.glob("checkpoint-*"), key=lambda s: int(s.name.split("-")[1]))[: -keep or None]:
            shutil.rmtree(state)  # they were kept until the step was done, so that a stop never costs training
        if "checkpoint" in step.entry.gives:
            r.checkpoint = folder / "result"
        if "reward" in step.entry.gives:
            r.reward = folder / "result"
        r.tuned += step.entry.family == "tune"
        if "dataset" in step.entry.gives:
            r.dataset = folder / "dataset.jsonl"
        result.steps.append(entry)
        result.report.step(entry)
    if to:
        _publish(r, result, to)
    return result


def _done(folder: Path, key: str, step: Step) -> dict[str, Any] | None:
    """What a finished step left; None where it is not finished, or what it left is gone or cannot be read any more."""
    try:
        entry = json.loads((folder / "done.json").read_text())
        there = (folder / "result").is_dir() or not {"checkpoint", "reward"} & set(step.entry.gives)
        return entry if entry["key"] == key and there else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _take_up(folder: Path, key: str, settings: list[Any], discard: bool) -> None:
    """Make a step's folder ready. What a run with other settings left there is worth something: it is thrown away only when told."""
    worth = [p.name for p in (*folder.glob("checkpoint-*"), *folder.glob("done.json"))]
    before = _read(folder / "settings.json")
    same = before == settings if before is not None else (folder / "key").is_file() and (folder / "key").read_text() == key
    if folder.exists() and not same and not (before is None and not _is_key(folder / "key")):
        if worth and not discard:
            other = f"other settings: {_difference(before, settings)}" if before else "other settings"
            raise UserError(
                f"{folder} holds {', '.join(sorted(worth))} of a stopped run with {other}",
                "they would be lost",
                "give the former command again, choose another folder, or say save.discard: true to begin anew",
            )
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / "key").write_text(key)
    write_json(folder / "settings.json", settings)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _is_key(file: Path) -> bool:
    """Whether a step's key is whole; one that was cut off says nothing."""
    return file.is_file() and len(file.read_text(errors="replace")) == 64


def _difference(before: Any, now: Any, where: str = "") -> str:
    """The first setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return _difference(before.get(name), now.get(name), f"{where}.{name}" if where else name)
    if isinstance(before, list) and isinstance(now, list):
        for a, b in zip(before, now, strict=False):
            if a != b:
                return _difference(a, b, where)
    return f"{where or 'inputs'} was {shown(before)} and is {shown(now)}"


def _driver(step: Step) -> Callable[[Run, Step, Path], dict[str, Any]]:
    kind = step.entry.shape.driver
    module = import_module(f"modelwright.runner.{kind}")  # torch and transformers are imported only where a step needs them
    return getattr(module, kind)


def _inputs(step: Step, r: Run) -> dict[str, str]:
    """Fingerprints of everything that a step reads."""
    found = {str(p): fingerprint_path(p) for p in paths(step.knobs)}
    if r.checkpoint and "checkpoint" in (*step.entry.takes, *step.entry.may_take):
        from modelwright.core.model.checkpoint import Checkpoint

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
    if "reward" in recipe.steps[-1].entry.gives:
        folder = last / "result"
    made = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".jsonl") and p.name not in _NOTES]
    lineage["files"] = {p.name: fingerprint(p) for p in made if p.is_file()}
    small = r.work / "steps"
    shutil.rmtree(small, ignore_errors=True)
    for i, step in enumerate(recipe.steps):
        (small / f"{i}-{step.entry.name}").mkdir(parents=True)
        for state in (r.work / f"{i}-{step.entry.name}").glob("checkpoint-*"):
            shutil.copytree(state, small / f"{i}-{step.entry.name}" / state.name, ignore=shutil.ignore_patterns(*_RESUMES))
        for name in ("done.json", "dynamics.parquet", "log.jsonl", "removed.jsonl", "dataset.jsonl", "adapter"):
            source = r.work / f"{i}-{step.entry.name}" / name
            if name == "dataset.jsonl" and source.parent == folder:  # it is the result itself
                continue
            if source.is_dir():
                shutil.copytree(source, small / f"{i}-{step.entry.name}" / name)
            elif source.exists():
                shutil.copyfile(source, small / f"{i}-{step.entry.name}" / name)
    shutil.rmtree(folder / "steps", ignore_errors=True)
    os.rename(small, folder / "steps")
    write_lineage(folder, lineage)
    if result.certificate and r.checkpoint:
        from modelwright.core.model.certificate import Certificate
        from modelwright.core.model.checkpoint import locate
        from modelwright.core.model.writer import write_card

        rows = [(k, f"{a} -> {b}" if a and a != b else b) for k, a, b in Certificate(**result.certificate).rows()]
        write_card(
            folder,
            recipe.name,
            recipe.base or "none",
            result.steps,
            rows,
            result.certificate["loads_in"],
            locate(recipe.base) if recipe.base else None,
        )
    result.report.recipe = recipe.as_yaml()
    result.report.facts |= {"result": str(to), "seed": recipe.seed, **lineage["versions"]}
    (folder / "report.html").write_text(result.report.html(), encoding="utf-8")
    write_json(folder / "report.json", result.plain())
    for name in _WORKING:
        (folder / name).unlink(missing_ok=True)
    try:
        os.rename(folder, to)
    except OSError:
        if os.path.lexists(to):
            raise UserError(
                f"{to} appeared while the run was working", "nothing is overwritten", "move it away and give the same command again"
            ) from None
        raise
    _remove_own(r.work)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the place of its result: what makes two runs the same run."""
    whole = recipe.plain()
    return whole | {"save": {k: v for k, v in whole["save"].items() if k not in ("to", "discard")}}


def _finished(recipe: Recipe, to: Path) -> Result | None:
    """The result of the same recipe, if it stands at `to` and is as it was written; UserError where it is damaged."""
    lineage, report = _read(to / "modelwright.json"), _read(to / "report.json")
    if not isinstance(lineage, dict) or lineage.get("recipe") != json.loads(json.dumps(finite(_identity(recipe)))):
        return None
    wrong = [n for n, value in (lineage.get("files") or {}).items() if not (to / n).is_file() or fingerprint(to / n) != value]
    if not isinstance(report, dict) or not isinstance(report.get("steps"), list):
        wrong.append("report.json")
    if wrong:
        raise UserError(
            f"{to} is the result of this recipe and is damaged",
            f"{wrong[0]} is not as it was written",
            "remove the folder and run it again",
        )
    result = Result(to, report["steps"], Report(recipe.name))
    for entry in result.steps:
        result.report.step(entry)
    return result
