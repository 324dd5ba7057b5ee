"""How a step that makes a model is run, certified and written down: one driver per family."""

import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright import launch, registry
from modelwright.core import dist, text
from modelwright.core.anatomy import Anatomy
from modelwright.core.certificate import certify, logits_of, probe_ids
from modelwright.core.checkpoint import Checkpoint, config_of, disk_shapes
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.technique import Technique, combine, surroundings
from modelwright.core.trainer import forward
from modelwright.core.training import fit
from modelwright.core.writer import Blueprint, Built, staging, write_model, write_tensors
from modelwright.moe.watch import domain_plot, watch
from modelwright.recipe import Step
from modelwright.runner import Run, with_dataset


def reshape(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    save, knobs = r.recipe.save, with_dataset(r, step.knobs)
    source = Checkpoint(r.checkpoint) if r.checkpoint and "checkpoint" in step.entry.takes else None
    if source:
        text.check_vocabulary(source.tokenizer(), int(source.hf_config.get_text_config().vocab_size), source.folder)
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
    return {n: math.prod(s) * made.dtypes[n].itemsize for n, s in disk_shapes(config_of(made.config)).items()}


def tune(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    step = replace(step, knobs=with_dataset(r, step.knobs))
    assert r.checkpoint
    source = Checkpoint(r.checkpoint)
    shutil.rmtree(folder / "result", ignore_errors=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    with staging(folder / "result") as part:
        if r.processes > 1:
            entry = launch.train_apart(r, step, source, folder, part)
        else:
            with r.progress.task(f"{step.entry.name}: train", 1) as tick:
                entry = train(step, source, folder, part, r.recipe.seed, r.recipe.save.shard_size, r.tuned, tick.to)
        with r.progress.task(f"{step.entry.name}: certify"):
            certificate = certify(source, Checkpoint(part, incomplete=True), "trained", mode=r.recipe.save.certificate)
    return entry | {"certificate": certificate.plain()}


def train(
    step: Step, source: Checkpoint, folder: Path, part: Path, seed: int, shard_size: int, rounds: int, tick: Callable[[int, int], None]
) -> dict[str, Any]:
    """Train and write the plain model into `part`; runs in every process, the first one writes. Returns the step's entry."""
    knobs, techniques = step.knobs, registry.techniques(step.entry, step.knobs)
    for t in techniques:
        t.round = rounds
    tokenizer, vocab = source.tokenizer(), int(source.hf_config.get_text_config().vocab_size)
    text.check_vocabulary(tokenizer, vocab, source.folder)
    combine(techniques, surroundings(source.skeleton, knobs.train))

    def rows_of(data: Data) -> text.Rows:
        return make_rows(techniques, data, tokenizer, vocab, knobs.train, seed)

    rows, evals = rows_of(knobs.data), {n: rows_of(d) for n, d in knobs.evals.items()}
    if not evals and len(rows) > 1 and knobs.holdout:
        at = max(1, len(rows) - max(1, round(len(rows) * knobs.holdout)))
        rows, evals["held out"] = rows.split(at)
    settings = knobs.train
    for t in techniques:
        settings = t.settings(rows, settings)
    outcome = fit(source.model(), rows, settings, techniques=techniques, evals=evals, folder=folder, seed=seed, tick=tick)
    entry = {
        "facts": {
            "data": rows.facts,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "processes": dist.world(),
            "energy_j": outcome.energy_j,
            "energy_source": outcome.energy_source,
            **outcome.facts,
        },
        "evals": outcome.evals,
        "liveness": outcome.liveness,
    }
    if dist.rank() == 0:
        model = outcome.model
        if any(p.role == "router" for p in Anatomy(source.skeleton)):
            entry["plots"] = routing_plots(model, evals or {"data": rows}, knobs.train.batch)
        for t in techniques:
            model = t.export(model, folder)
        changed = next((t.tokenizer for t in techniques if t.tokenizer is not None), None)
        write_model(Built(model, changed, source), part, shard_size)
        entry["facts"]["reload_max_abs_dlogit"] = _same_when_reloaded(model, Checkpoint(part, incomplete=True))
    return entry


def make_rows(techniques: list[Technique], data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> text.Rows:
    """The rows of a source as the techniques want them, or as plain texts and chats."""
    for t in techniques:
        if (rows := t.rows(data, tokenizer, vocab, train, seed)) is not None:
            return rows
    return text.tokenize(text.read(data), tokenizer, vocab, train.context)


def routing_plots(model: Any, texts: dict[str, text.Rows], batch: int) -> list[dict[str, Any]]:
    """How the routers use their experts on the held-out texts, 64 rows of each at most; one process alone."""
    counts: dict[str, Any] = {}
    model.eval()
    with watch(model) as seen, torch.no_grad():
        for name, rows in texts.items():
            before = seen.counts.clone()
            for i in range(0, min(len(rows), 64), batch):
                part = text.collate([rows[j] for j in range(i, min(len(rows), i + batch))])
                forward(model, {k: v.to(model.device) for k, v in part.items()})
            counts[name] = seen.counts - before
    return [*seen.plots(), *([domain_plot(counts)] if len(counts) > 1 else [])]


def _same_when_reloaded(model: Any, saved: Checkpoint) -> float:
    """The largest logit difference between a model in memory and what a fresh object loads from disk; raises when it is real."""
    ids = probe_ids(saved)[0]
    drift = float((logits_of(model, ids) - logits_of(saved.model(model.dtype).to(model.device), ids)).abs().max())
    if not drift <= 1e-3:
        raise RuntimeError(f"the saved model differs from the one in memory by {drift:.1e} in its logits")
    return drift


def calm() -> None:
    """Quiet transformers: our own bars and sentences speak."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


OF: dict[str, Callable[[Run, Step, Path], dict[str, Any]]] = {"reshape": reshape, "tune": tune}
