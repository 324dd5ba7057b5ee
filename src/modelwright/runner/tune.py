"""A step that trains: rows made, techniques put together, trained in one process or many, certified."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright import registry
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows, collate, tokenize
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import certify, require_same_when_reloaded
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary, silence_transformers
from modelwright.core.model.writer import Built, staging, write_model
from modelwright.core.train import dist
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique, combine, surroundings
from modelwright.core.train.trainer import forward
from modelwright.moe.watch import domain_plot, watch
from modelwright.runner.context import Run, with_dataset
from modelwright.runner.processes import train_apart
from modelwright.runner.recipe import Step


def tune(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    silence_transformers()
    step = replace(step, knobs=with_dataset(r, step.knobs))
    assert r.checkpoint
    source = Checkpoint(r.checkpoint)
    shutil.rmtree(folder / "result", ignore_errors=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    with staging(folder / "result") as part:
        if r.processes > 1:
            entry = train_apart(r, step, source, folder, part)
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
    check_vocabulary(tokenizer, vocab, source.folder)
    combine(techniques, surroundings(source.skeleton, knobs.train))

    def rows_of(data: Data) -> Rows:
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
        entry["facts"]["reload_max_abs_dlogit"] = require_same_when_reloaded(model, Checkpoint(part, incomplete=True))
    return entry


def make_rows(techniques: list[Technique], data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> Rows:
    """The rows of a source as the techniques want them, or as plain texts and chats."""
    for t in techniques:
        if (rows := t.rows(data, tokenizer, vocab, train, seed)) is not None:
            return rows
    return tokenize(read(data), tokenizer, vocab, train.context)


def routing_plots(model: Any, texts: dict[str, Rows], batch: int) -> list[dict[str, Any]]:
    """How the routers use their experts on the held-out texts, 64 rows of each at most; one process alone."""
    counts: dict[str, Any] = {}
    model.eval()
    with watch(model) as seen, torch.no_grad():
        for name, rows in texts.items():
            before = seen.counts.clone()
            for i in range(0, min(len(rows), 64), batch):
                part = collate([rows[j] for j in range(i, min(len(rows), i + batch))])
                forward(model, {k: v.to(model.device) for k, v in part.items()})
            counts[name] = seen.counts - before
    return [*seen.plots(), *([domain_plot(counts)] if len(counts) > 1 else [])]
