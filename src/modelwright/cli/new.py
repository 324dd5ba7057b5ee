"""`modelwright new`: the stubs of a method in a checkout, ready to be filled."""

from pathlib import Path

from modelwright import registry
from modelwright.core.errors import UserError, did_you_mean

_METHOD = {
    "tune": '''"""{title}: what it is for, in one line.

Paper: TITLE (arXiv ID). Equations: ...
Official code, where it differs: ...
Ours: ...
"""

from dataclasses import dataclass

from modelwright.core.knobs import Tune
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    """Add the method's own."""


class {cls}(Technique):
    """Override the parts that the method changes: attach, select, prepare, terms, on_gradients, after_step."""

    name = "{name}"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
''',
    "reshape": '''"""{title}: what it is for, in one line.

Paper: TITLE (arXiv ID). Equations: ...
Official code, where it differs: ...
Ours: ...
"""

from dataclasses import dataclass

from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built


@dataclass(frozen=True)
class Knobs:
    pass


def {name}(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The new model, and what it promises: 'same function' or 'changed function'."""
    return Built(source.model(), None, source), "same function"
''',
}
_RECIPE = {
    "tune": """name: {name}
base: seedling
steps:
  - tune.{name}: {{data: {{path: corpus.txt}}, train: {{tokens: 100k}}}}
save: {{to: out/{name}}}
""",
    "reshape": """name: {name}
base: seedling
steps:
  - reshape.{name}: {{}}
save: {{to: out/{name}}}
""",
}
_TEST = '''"""{title}: the invariants that hold exactly."""


def test_{name}_is_proven() -> None:
    raise AssertionError("write the first invariant of {family}.{name}")
'''


def scaffold(family: str, name: str, root: Path) -> list[Path]:
    """Write the method, its recipe, its test and its registry line under `root`, a checkout. Returns the files."""
    if family not in _METHOD:
        raise UserError(f"no stubs for family '{family}'", how=did_you_mean(family, _METHOD))
    if not name.isidentifier() or name != name.lower():
        raise UserError(f"'{name}' is no name for a method", how="use snake_case, such as my_method")
    if any(e.name == f"{family}.{name}" for e in registry.entries()):
        raise UserError(f"{family}.{name} exists already", how="choose another name")
    house = root / "src" / "modelwright"
    if not (house / "registry.py").is_file():
        raise UserError(f"{root} is no checkout of modelwright", "it has no src/modelwright/registry.py", "go to the root of one")
    words = {
        "name": name,
        "family": family,
        "title": name.replace("_", " ").capitalize(),
        "cls": "".join(w.capitalize() for w in name.split("_")),
    }
    files = {
        house / family / f"{name}.py": _METHOD[family],
        house / "recipes" / f"{name}.yaml": _RECIPE[family],
        root / "tests" / family / f"test_{name}.py": _TEST,
    }
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already", "nothing is overwritten")
    for file, template in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template.format(**words))
    made = words["cls"] if family == "tune" else name
    line = f'    Entry("{family}.{name}", "modelwright.{family}.{name}:{made}", "one line", "arXiv ID"' + (
        ',\n          takes=("checkpoint", "dataset"), loads_in=STOCK),\n' if family == "tune" else ", loads_in=STOCK),\n"
    )
    registered = house / "registry.py"
    registered.write_text(registered.read_text().replace("]\nFAMILIES", line + "]\nFAMILIES", 1))
    return [*files, registered]
