"""A step that makes data."""

from pathlib import Path
from typing import Any

from modelwright import registry
from modelwright.runner.context import Run
from modelwright.runner.recipe import Step


def curate(r: Run, step: Step, folder: Path) -> dict[str, Any]:
    with r.progress.task(step.entry.name):
        return {"facts": registry.load(step.entry)(step.knobs, folder, r.recipe.seed)}
