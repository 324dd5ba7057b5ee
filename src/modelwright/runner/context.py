"""A recipe under way, and what it gives."""

import json
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from modelwright.core.knobs import Data
from modelwright.core.report.page import Report
from modelwright.core.report.progress import Progress
from modelwright.runner.recipe import Recipe


@dataclass
class Result:
    """What a run gives: the folder, one dictionary per step, and the report."""

    to: Path | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(""))

    def _repr_html_(self) -> str:
        """The report, where a notebook shows the result; the frame keeps the page's styles to itself."""
        return f'<iframe srcdoc="{escape(self.report.html())}" style="width:100%;height:600px;border:0"></iframe>'

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
    reward: Path | None = None  # a reward model
    history: list[dict[str, Any]] = field(default_factory=list)
    base_fingerprint: str | None = None
    processes: int = 1  # that train together
    tuned: int = 0  # tuning steps so far, earlier runs included


def with_artifacts(r: Run, knobs: Any) -> Any:
    """A step's knobs, reading what an earlier step curated where they name no data, and the reward model that one trained."""
    if isinstance(getattr(knobs, "data", None), Data) and not knobs.data.path and not knobs.data.sources and r.dataset:
        with r.dataset.open(encoding="utf-8") as file:
            usual = "text" if "text" in json.loads(file.readline() or "{}") else None  # else the layout is recognised
        knobs = replace(knobs, data=replace(knobs.data, path=str(r.dataset), column=knobs.data.column or usual))
    if r.reward and getattr(knobs, "reward", "") is None and not getattr(knobs, "reward_function", None):
        return replace(knobs, reward=str(r.reward))
    return knobs
