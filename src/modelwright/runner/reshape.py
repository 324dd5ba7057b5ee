"""A step that maps checkpoints to a new one: planned, written, certified."""

import math
import shutil
from pathlib import Path
from typing import Any

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.model.certificate import certify, require_same_when_reloaded
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary, silence_transformers
from modelwright.core.model.classes import config_of, disk_shapes
from modelwright.core.model.writer import Blueprint, staging, write_model, write_tensors
from modelwright.runner.context import Run, with_artifacts
from modelwright.runner.recipe import Step


def reshape(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    silence_transformers()
    save, knobs = r.recipe.save, with_artifacts(r, step.knobs)
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
            require_same_when_reloaded(made.model, Checkpoint(part, incomplete=True))
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
