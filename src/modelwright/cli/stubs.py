"""What `modelwright new` writes: one small method that runs for each kind of family, and what stands around it.

Words in braces are filled in: name, cls, title, family, package, module, dist.
"""

_HEAD = '''"""{title}: what it is for, and when to use it, in one sentence.

Paper: TITLE (arXiv ID). Equations: ...
The official code differs: ...
Ours: ...
"""

'''
TUNE = (
    _HEAD
    + '''from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    frozen: str = knob("norm", "parameters with this word in their name do not move")


class {cls}(Technique):
    """Override the parts that the method changes: rows, attach, select, terms, on_gradients, after_step."""

    name = "{name}"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        chosen = [p for n, p in model.named_parameters() if self.knobs.frozen in n]
        if not chosen:
            raise UserError(f"frozen={{self.knobs.frozen!r}} fits no parameter", how="`model.named_parameters()` lists the names")
        for p in chosen:
            p.requires_grad_(False)


METHOD = {cls}
'''
)
RESHAPE = (
    _HEAD
    + '''from dataclasses import dataclass

from modelwright.core.knobs import knob
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built


@dataclass(frozen=True)
class Knobs:
    scale: float = knob(1.0, "what the weights are multiplied with", low=0)


def {name}(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The new model, and what it promises: 'same function' or 'changed function'. The source is not changed."""
    model = source.model()
    for p in model.parameters():
        p.data.mul_(knobs.scale)
    return Built(model, None, source, {{"scale": knobs.scale}}), "same function" if knobs.scale == 1 else "changed function"


METHOD = {name}
'''
)
CURATE = (
    _HEAD
    + '''import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.core.knobs import knob


@dataclass(frozen=True)
class Knobs:
    rows: int = knob(100, "documents to make", low=1)


def {name}(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write `dataset.jsonl` with a column text into `folder`; returns counts, removals with their reason among them."""
    with open(folder / "dataset.jsonl", "w", encoding="utf-8") as out:
        for i in range(knobs.rows):
            out.write(json.dumps({{"text": f"document {{i}}"}}) + "\\n")
    return {{"documents": knobs.rows, "removed": 0}}


METHOD = {name}
'''
)
MEASURE = (
    _HEAD
    + '''from dataclasses import dataclass

from modelwright.core.step import EvalResult, StepContext
from modelwright.core.knobs import knob


@dataclass(frozen=True)
class Knobs:
    limit: int = knob(100, "use at most this many items", low=1)


def {name}(knobs: Knobs, job: StepContext) -> EvalResult:
    """Measure, and say what came out: metrics for scripts, a sentence, tiles, tables and plots for people."""
    items = [len(name) for name in (job.source.table if job.source else ("one", "two"))][: knobs.limit]
    mean = sum(items) / len(items)
    return EvalResult({{"items": len(items), "mean": mean}}, f"{{len(items)}} items, {{mean:.1f}} in the mean.")


METHOD = {name}
'''
)
METHODS = {"tune": TUNE, "reshape": RESHAPE, "curate": CURATE}  # every other family measures
SHAPES = {
    "tune": "TUNES",
    "reshape": "RESHAPES",
    "curate": "CURATES",
    "reward": "MEASURES",
    "rl": "PROBES",
    "cache": "SERVES",
    "judge": "JUDGES",
    "inspect": "PROBES",
    "modalities": "MEASURES",
}
WITH_BASE = ("tune", "reshape", "rl", "cache", "judge", "inspect")
_RUNS = {"tune": '{"train": SHORT}, tmp_path, make="text"'}
_STEPS = {"tune": "{data: {path: corpus.txt}, train: {tokens: 100k}}"}

TEST = '''"""{title}: it runs on a small checkpoint, in bf16 too; and the invariants that hold exactly."""

from pathlib import Path

import pytest

from modelwright.testing import {imports}


@pytest.mark.parametrize("bf16", [False, True])
def test_{name}_runs_and_what_it_saves_loads(tmp_path: Path, bf16: bool) -> None:
    check_method("{family}.{name}", {run}, bf16=bf16)
'''
UNPROVEN = """

def test_{name}_is_proven() -> None:
    raise AssertionError("write the first invariant of {family}.{name}")
"""
PROVEN = {
    "tune": """

def test_what_is_frozen_stays_and_the_rest_moves(tmp_path: Path) -> None:
    from modelwright import Checkpoint

    result = check_method("{family}.{name}", {run})
    before, after = Checkpoint("seedling"), Checkpoint(result.to)
    moved = {{n for n in before.table if not before.get(n).equal(after.get(n))}}
    assert moved and not any("norm" in n for n in moved)
""",
}
RECIPE = """# {title} (arXiv ID): the paper's values.
name: {dashed}
{base}steps:
  - {family}.{name}: {step}
save: {{to: out/{dashed}}}
"""
BENCH = '''"""{family}.{name}: the paper's claim against its baseline and its control, with three seeds or more."""

from common import save

SEEDS = [0, 1, 2]


def main() -> None:
    raise SystemExit("write the measurement of {family}.{name} first")
    save("{name}", claim="...", outcome="...", columns=["arm", "value"], rows=[], seeds=SEEDS)


if __name__ == "__main__":
    main()
'''
PYPROJECT = """[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "{dist}"
version = "0.1.0"
description = "Methods for modelwright: {family}.{name}."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["modelwright"]

[project.optional-dependencies]
dev = ["pytest>=8"]

[project.entry-points."modelwright.methods"]
{package} = "{package}:METHODS"

[tool.setuptools.packages.find]
where = ["src"]
"""
INIT = '''"""Methods for modelwright, one line each. Nothing is imported until a method is used."""

from modelwright.registry import {shape}, method

METHODS = [
    method("{family}.{name}", "{title}, in one line", "arXiv ID", {shape}, module="{module}"),
]
'''
README = """# {dist}

Methods for modelwright in a package of their own.

```sh
pip install -e '.[dev]'
modelwright list                        # {family}.{name} is among the methods
modelwright show {family}.{name}
modelwright try {family}.{name}    # on the embedded model, with a report
modelwright run recipe.yaml
pytest
```

- `src/{package}/__init__.py`: the table, one line per method. `pyproject.toml` names it as an entry point of the group
  `modelwright.methods`.
- `src/{package}/{name}.py`: the method. Its settings are the frozen dataclass `Knobs`; the command line, recipes and `show` are
  read off it without importing the file, so `Knobs` may use the names of `dataclasses`, `typing` and `modelwright.core.knobs` alone.
- `tests/test_{name}.py`: `modelwright.testing.check_method` runs the method, loads what it saved and looks at the certificate.

One more method is one more file with `METHOD = ...` at its foot, and one more line in the table.
"""


def words(family: str, name: str, package: str = "") -> dict[str, str]:
    """The words that the templates are filled with."""
    runs = _RUNS.get(family, "{}, tmp_path")
    return {
        "family": family,
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "cls": "".join(w.capitalize() for w in name.split("_")),
        "dashed": name.replace("_", "-"),
        "package": package,
        "dist": package.replace("_", "-"),
        "module": f"{package}.{name}",
        "shape": SHAPES[family],
        "imports": "SHORT, check_method" if family == "tune" else "check_method",
        "run": runs,
        "step": _STEPS.get(family, "{}"),
        "base": "base: seedling\n" if family in WITH_BASE else "",
    }


def method_of(family: str) -> str:
    """The template of a family's method."""
    return METHODS.get(family, MEASURE)


def test_of(family: str) -> str:
    """The test of a method in a package: it passes as written."""
    return TEST + PROVEN.get(family, "")
