"""A step that makes data."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.core.step import EvalResult
from modelwright.runner.context import Run, with_artifacts
from modelwright.runner.recipe import Step


def curate(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    with r.progress.task(step.entry.name):
        found = registry.load(step.entry)(with_artifacts(r, step.knobs), folder, r.recipe.seed)
    return {f.name: getattr(found, f.name) for f in fields(found)} if isinstance(found, EvalResult) else {"facts": found}
