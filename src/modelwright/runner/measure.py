"""A step that measures: reward, judge, cache, inspect. Imports torch only where it has a checkpoint."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.core.step import EvalResult, StepContext
from modelwright.runner.context import Run, with_artifacts
from modelwright.runner.recipe import Step


def measure(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    source = None
    if r.checkpoint and "checkpoint" in (*step.entry.takes, *step.entry.may_take):
        import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
        from modelwright.core.model.checkpoint import Checkpoint, silence_transformers

        silence_transformers()
        source = Checkpoint(r.checkpoint)
    job = StepContext(folder, r.recipe.seed, r.progress, source, registry.techniques_named)
    found: EvalResult = registry.load(step.entry)(with_artifacts(r, step.knobs), job)
    return {f.name: getattr(found, f.name) for f in fields(found)}
