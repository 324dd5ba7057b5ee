"""Runs a recipe: each step in a folder of its own, results published in one rename, a stopped run taken up where it was.

While it runs everything lies in `TO.run/`; at the end the last result becomes `TO`, with the report, the lineage and the
steps' small artifacts inside it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.core.certificate import Certificate, certify, logits_of, probe_ids
from modelwright.core.checkpoint import Checkpoint, fingerprint, fingerprint_path, versions
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, paths, plain
from modelwright.core.progress import Progress, Silent
from modelwright.core.report import Report
from modelwright.core.text import check_vocabulary
from modelwright.core.writer import Blueprint, Built, disk_errors, staging, write_card, write_lineage, write_model, write_tensors
from modelwright.recipe import Recipe, Step, check, parse


@dataclass
class Result:
    """What a run gives: the folder, one dictionary per step, and the report."""

    to: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(""))

    @property
    def certificate(self) -> dict[str, Any] | None:
        return next((s["certificate"] for s in reversed(self.steps) if s.get("certificate")), None)

    def plain(self) -> dict[str, Any]:
        """For --json: the last certificate and its sizes stand at the top."""
        c = self.certificate or {}
        top: dict[str, Any] = {k: c[k] for k in ("params_total", "params_active", "loads_in") if k in c}
        return {"to": str(self.to), **top, "certificate": c or None, "steps": self.steps}


@dataclass
class _Run:
    recipe: Recipe
    work: Path
    progress: Progress
    checkpoint: Path | None = None
    dataset: Path | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def run(
    name: str,
    *,
    to: str | Path,
    base: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    save: dict[str, Any] | None = None,
    **knobs: Any,
) -> Result:
    """One step as one call: run("reshape.upcycle", base="X", to="Y", experts=4). Raises UserError for bad input."""
    raw = {
        "name": name,
        "seed": seed,
        "base": str(base) if base else None,
        "steps": [{name: _raw(knobs)}],
        "save": {**(save or {}), "to": str(to)},
    }
    return run_recipe(parse(raw, name=name), progress)


def _raw(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {k: _raw(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> Result:
    """Run all steps. A recipe whose result exists already is not run again."""
    check(recipe)
    calm()
    to = Path(recipe.save.to or os.path.join("out", recipe.name))
    work = to.with_name(to.name + ".run")
    if done := _finished(recipe, to):
        shutil.rmtree(work, ignore_errors=True)
        return done
    if os.path.exists(to):  # unlike Path.exists, false for a name too long
        raise UserError(f"{to} exists already", "nothing is overwritten", "choose another folder or remove it")
    r = _Run(recipe, work, progress or Silent())
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


def _run_steps(r: _Run, to: Path) -> Result:
    recipe, result = r.recipe, Result(to, report=Report(r.recipe.name))
    if recipe.base:
        source = Checkpoint(recipe.base)
        r.checkpoint = source.folder
        r.history = (source.lineage or {}).get("steps", [])
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
            entry = _STEPS[step.entry.family](r, step, folder)
            entry |= {
                "step": step.entry.name,
                "key": key,
                "seed": recipe.seed,
                "knobs": plain(step.knobs),
                "inputs": inputs,
                "seconds": round(time.perf_counter() - began, 2),
            }
            _write_json(folder / "done.json", entry)
        for state in folder.glob("checkpoint-*"):  # kept until the step is done, so that a stop never costs training
            shutil.rmtree(state)
        if "checkpoint" in step.entry.gives:
            r.checkpoint = folder / "result"
        if "dataset" in step.entry.gives:
            r.dataset = folder / "dataset.jsonl"
        result.steps.append(entry)
        result.report.step(entry)
    _publish(r, result, to)
    return result


def _inputs(step: Step, r: _Run) -> dict[str, str]:
    """Fingerprints of everything that a step reads."""
    found = {str(p): fingerprint_path(p) for p in paths(step.knobs)}
    if r.checkpoint and "checkpoint" in step.entry.takes:
        found["checkpoint"] = Checkpoint(r.checkpoint).fingerprint()
    if r.dataset and "dataset" in step.entry.takes:
        found["dataset"] = fingerprint(r.dataset)
    return found


def _publish(r: _Run, result: Result, to: Path) -> None:
    recipe, last = r.recipe, r.work / f"{len(r.recipe.steps) - 1}-{r.recipe.steps[-1].entry.name}"
    lineage = {
        "modelwright": versions()["modelwright"],
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe": _identity(recipe),
        "recipe_key": result.steps[-1]["key"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base": recipe.base,
        "base_fingerprint": Checkpoint(recipe.base).fingerprint() if recipe.base else None,
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
        rows = [(k, f"{a} -> {b}" if a and a != b else b) for k, a, b in Certificate(**result.certificate).rows()]
        write_card(folder, recipe.name, recipe.base or "none", result.steps, rows, result.certificate["loads_in"])
    result.report.facts |= {"result": str(to), "seed": recipe.seed, **lineage["versions"]}
    (folder / "report.html").write_text(result.report.html(), encoding="utf-8")
    _write_json(folder / "report.json", result.plain())
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


# ---- one driver per family -------------------------------------------------------------------------------------------
def _curate(r: _Run, step: Step, folder: Path) -> dict[str, Any]:
    with r.progress.task(step.entry.name):
        facts = registry.load(step.entry)(step.knobs, folder, r.recipe.seed)
    return {"facts": facts}


def _reshape(r: _Run, step: Step, folder: Path) -> dict[str, Any]:
    save, knobs = r.recipe.save, _with_dataset(r, step.knobs)
    source = Checkpoint(r.checkpoint) if r.checkpoint and "checkpoint" in step.entry.takes else None
    if source:
        check_vocabulary(source.tokenizer(), int(source.hf_config.get_text_config().vocab_size), source.folder)
    with r.progress.task(f"{step.entry.name}: plan"):
        made, promise = registry.load(step.entry)(source, knobs, r.recipe.seed)
    shutil.rmtree(folder / "result", ignore_errors=True)
    with staging(folder / "result") as part:
        if isinstance(made, Blueprint):
            total = sum(_bytes(made).values())
            with r.progress.task(f"{step.entry.name}: write", total) as tick:
                write_tensors(made, part, save.shard_size, tick)
        else:
            with r.progress.task(f"{step.entry.name}: write"):
                write_model(made, part, save.shard_size)
            _same_when_reloaded(made.model, Checkpoint(part, incomplete=True))
        entry: dict[str, Any] = {"facts": made.facts}
        with r.progress.task(f"{step.entry.name}: certify"):
            after = Checkpoint(part, incomplete=True)
            certificate = certify(source or after, after, promise, mode=save.certificate)
        entry["certificate"] = certificate.plain()
        if certificate.passed is False and not save.force:
            raise UserError(
                f"the result of {step.entry.name} failed its certificate",
                f"logits differ by {certificate.max_abs_dlogit:.2e} and {certificate.tolerance:.2e} was promised",
                "nothing was saved; report it, or set save.force=true to save all the same",
            )
    return entry


def _bytes(made: Blueprint) -> dict[str, int]:
    import torch

    from modelwright.core.checkpoint import config_of, disk_shapes

    return {n: torch.Size(s).numel() * made.dtypes[n].itemsize for n, s in disk_shapes(config_of(made.config)).items()}


def _tune(r: _Run, step: Step, folder: Path) -> dict[str, Any]:
    from modelwright.core import text
    from modelwright.core.training import fit

    knobs = _with_dataset(r, step.knobs)
    assert r.checkpoint
    source = Checkpoint(r.checkpoint)
    tokenizer = source.tokenizer()
    vocab = int(source.hf_config.get_text_config().vocab_size)
    text.check_vocabulary(tokenizer, vocab, source.folder)
    context = knobs.train.context
    with r.progress.task(f"{step.entry.name}: read"):
        rows = text.tokenize(text.read(knobs.data), tokenizer, vocab, context)
        evals = {n: text.tokenize(text.read(d), tokenizer, vocab, context) for n, d in knobs.evals.items()}
    if not evals and len(rows) > 1 and knobs.holdout:
        at = max(1, len(rows) - max(1, round(len(rows) * knobs.holdout)))
        rows, evals["held out"] = rows.split(at)
    technique = registry.load(step.entry)(knobs)
    with r.progress.task(f"{step.entry.name}: train", 1) as tick:
        outcome = fit(
            source.model(),
            rows,
            knobs.train,
            techniques=[technique],
            evals=evals,
            folder=folder,
            seed=r.recipe.seed,
            tick=lambda done, of: tick.to(done, of),
        )
    shutil.rmtree(folder / "result", ignore_errors=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    with staging(folder / "result") as part:
        model = technique.export(outcome.model, folder)
        write_model(Built(model, None, source), part, r.recipe.save.shard_size)
        with r.progress.task(f"{step.entry.name}: certify"):
            after = Checkpoint(part, incomplete=True)
            drift = _same_when_reloaded(model, after)
            certificate = certify(source, after, "trained", mode=r.recipe.save.certificate)
    return {
        "facts": {
            "data": rows.facts,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "energy_j": outcome.energy_j,
            "energy_source": outcome.energy_source,
            "reload_max_abs_dlogit": drift,
        },
        "evals": outcome.evals,
        "liveness": outcome.liveness,
        "certificate": certificate.plain(),
    }


def _same_when_reloaded(model: Any, saved: Checkpoint) -> float:
    """The largest logit difference between a model in memory and what a fresh object loads from disk; raises when it is real."""
    ids = probe_ids(saved)[0]
    drift = float((logits_of(model, ids) - logits_of(saved.model(model.dtype).to(model.device), ids)).abs().max())
    if not drift <= 1e-3:
        raise RuntimeError(f"the saved model differs from the one in memory by {drift:.1e} in its logits")
    return drift


def _with_dataset(r: _Run, knobs: Any) -> Any:
    if isinstance(getattr(knobs, "data", None), Data) and not knobs.data.path and r.dataset:
        return replace(knobs, data=replace(knobs.data, path=str(r.dataset), column=knobs.data.column or "text"))
    return knobs


_STEPS: dict[str, Callable[[_Run, Step, Path], dict[str, Any]]] = {"curate": _curate, "reshape": _reshape, "tune": _tune}


def _write_json(file: Path, value: Any) -> None:
    part = file.with_name(file.name + ".tmp")
    part.write_text(json.dumps(value, indent=1, default=str) + "\n")
    part.replace(file)


def calm() -> None:
    """Quiet transformers: our own bars and sentences speak."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
