"""JudgeBench (arXiv 2410.12784): 350 pairs with objective labels, scored by reward models.

A row per pair: label "A>B" or "B>A", source, scores {model: [A, B]} (or [A, B]), and len_A, len_B (characters), md_A, md_B,
or the texts response_A, response_B; and pair_id, which may stand there once. A tie counts as wrong. Sections are the four kinds of source.
"""

from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError
from modelwright.reward.suites.common import Case, counted
from modelwright.reward.table.evidence import Heads
from modelwright.reward.table.scores import Source, finite, pairs, unique

ROLES = ("pair_id", "label", "scores", "source", "response_A", "response_B")
SECTIONS = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math", "livecodebench": "coding"}


def judgebench(path: Path, features: list[str], columns: dict[str, str], text_path: str | None) -> list[Case]:
    """One case for each reward model in the file."""
    source = Source(path, columns, roles=ROLES)
    if source.has("pair_id"):
        unique(source, "pair_id")
    labels, rows = source.get("label"), source.get("scores")
    if bad := [i for i, v in enumerate(labels) if v not in ("A>B", "B>A")]:
        raise UserError(f"row {bad[0] + 1} of {path} has the label {labels[bad[0]]!r}", "it must be A>B or B>A")
    chosen, at = np.array([0 if v == "A>B" else 1 for v in labels]), np.arange(len(rows))
    parts = [next((v for k, v in SECTIONS.items() if str(s).startswith(k)), str(s)) for s in source.get("source")]
    both = {f: _feature(source, f) for f in features}
    cases = []
    for model in rows[0] if isinstance(rows[0], dict) else [path.stem]:
        score = _scores([r.get(model) if isinstance(r, dict) else r for r in rows], model, path)
        picked = {f: (v[at, chosen], v[at, 1 - chosen]) for f, v in both.items()}
        s = pairs(model, score[at, chosen], score[at, 1 - chosen], picked, parts)
        heads: Heads = {"accuracy": dict(zip(s.parts, np.bincount(s.part).astype(float), strict=True))}
        cases.append((s, heads | {p: {p: 1.0} for p in s.parts}))
    return cases


def _scores(values: list[Any], model: str, path: Path) -> np.ndarray:
    """(n, 2)"""
    if bad := [i for i, v in enumerate(values) if not isinstance(v, list) or len(v) != 2]:
        raise UserError(f"row {bad[0] + 1} of {path} has no two scores by {model}", f"it holds {values[bad[0]]!r}", "a pair has two sides")
    return np.stack([finite([v[i] for v in values], f"the scores by {model} in {path}") for i in (0, 1)], 1)


def _feature(source: Source, name: str) -> np.ndarray:
    """(n, 2)"""
    column = {"length": "len", "markdown": "md"}.get(name, name)
    if source.has(f"{column}_A"):
        return np.stack([source.numbers(f"{column}_{side}") for side in "AB"], 1)
    return np.stack([counted(source.get(f"response_{side}"), name, source.path) for side in "AB"], 1)
