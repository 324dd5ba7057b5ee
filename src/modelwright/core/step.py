"""What a step that measures is handed, and what it gives back: reward, judge, inspect."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.core.report.progress import Silent


@dataclass
class StepContext:
    """What one step is handed. `folder` takes its small files; `source` is the checkpoint, where there is one."""

    folder: Path
    seed: int = 0
    progress: Silent = field(default_factory=Silent)
    source: Any = None
    technique: Callable[[str, dict[str, Any]], list[Any]] | None = None  # ways to tune, by name and settings


@dataclass
class EvalResult:
    """What was measured. `metrics` is for scripts (nested plain values); the rest is for people."""

    metrics: dict[str, Any]
    text: str = ""  # one sentence that says what came out
    tiles: list[tuple[str, str, str]] = field(default_factory=list)  # value, what it is, remark
    tables: list[dict[str, Any]] = field(default_factory=list)  # title, columns, rows
    plots: list[dict[str, Any]] = field(default_factory=list)  # see core/report/plots.py
    facts: dict[str, Any] = field(default_factory=dict)
