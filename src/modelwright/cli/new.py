"""`modelwright new`: the stubs of a method in this checkout, or an installable package with one method."""

import keyword
from pathlib import Path

from modelwright import registry
from modelwright.cli import stubs
from modelwright.core.errors import UserError, did_you_mean


def scaffold(family: str, name: str, root: Path) -> list[Path]:
    """Write all that a method needs under `root`, a checkout: its file, registry line, matrix row, recipe, test and
    benchmark. Returns the files; `make docs` adds its page. Raises UserError before anything is written."""
    _check(family, name)
    package = root / "src" / "modelwright"
    table, matrix = package / "registry" / "table.py", root / "tests" / "matrix.py"
    for file in (table, matrix):
        if not file.is_file():
            raise UserError(f"{root} is no checkout of modelwright", f"it has no {file.relative_to(root)}", "go to the root of one")
    words = stubs.words(family, name)
    new = {
        package / family / f"{name}.py": stubs.method_of(family),
        package / "recipes" / f"{words['dashed']}.yaml": stubs.RECIPE,
        root / "tests" / family / f"test_{name}.py": stubs.TEST + stubs.UNPROVEN,
        root / "bench" / f"{name}.py": stubs.BENCH,
    }
    filled = {file: template.format(**words) for file, template in new.items()}
    line = f'    method("{family}.{name}", "{words["title"]}, in one line", "arXiv ID", {words["shape"]}),\n'
    changed = {
        table: _insert(table, "]\n# fmt: on", line),
        matrix: _insert(matrix, "\n}\n", "\n" + _row(family, name).rstrip("\n"), last=True),
    }
    if not (init := package / family / "__init__.py").exists():
        filled[init] = f'"""{registry.FAMILIES[family].capitalize()}."""\n'
    _write(filled)
    for file, text in changed.items():
        file.write_text(text, encoding="utf-8")
    return [*filled, *changed]


def scaffold_package(package: str, family: str, name: str, root: Path) -> list[Path]:
    """Write an installable package with one method, its test and a README into `root`/`package`. Returns the files."""
    if not _is_name(package) or package == "modelwright":
        raise UserError(f"'{package}' is no name for a package", how="use snake_case, such as my_methods")
    _check(family, name)
    words = stubs.words(family, name, package)
    folder = root / package
    if folder.exists():
        raise UserError(f"{folder} exists already", "nothing is overwritten", "choose another name or another place")
    new = {
        folder / "pyproject.toml": stubs.PYPROJECT,
        folder / "README.md": stubs.README,
        folder / "recipe.yaml": stubs.RECIPE,
        folder / "src" / package / "__init__.py": stubs.INIT,
        folder / "src" / package / f"{name}.py": stubs.method_of(family),
        folder / "tests" / f"test_{name}.py": stubs.test_of(family),
    }
    _write(filled := {file: template.format(**words) for file, template in new.items()})
    return list(filled)


def _is_name(word: str) -> bool:
    return word.isidentifier() and word.isascii() and word == word.lower() and not keyword.iskeyword(word)


def _check(family: str, name: str) -> None:
    if family not in registry.FAMILIES:
        raise UserError(f"no family is called '{family}'", how=did_you_mean(family, registry.FAMILIES))
    if not _is_name(name):
        raise UserError(f"'{name}' is no name for a method", how="use snake_case, such as my_method")
    if any(e.name == f"{family}.{name}" for e in registry.entries()):
        raise UserError(f"{family}.{name} exists already", how="choose another name")


def _row(family: str, name: str) -> str:
    """The method's line in tests/matrix.py."""
    knobs = '{"train": _TRAIN}' if family == "tune" else "{}"
    families = 'families=("llama",)' if family in stubs.WITH_BASE else 'families=("",)'
    data = ", data=True" if family == "tune" else ""
    return f'    "{family}.{name}": Row({knobs}, ("tests/{family}/test_{name}.py",), {families}{data}),\n'


def _insert(file: Path, mark: str, text: str, last: bool = False) -> str:
    """The file's text with `text` before the first (or last) `mark`; at the end where there is none."""
    whole = file.read_text(encoding="utf-8")
    at = whole.rfind(mark) if last else whole.find(mark)
    return whole[:at] + text + whole[at:] if at >= 0 else whole.rstrip("\n") + "\n\n" + text


def _write(files: dict[Path, str]) -> None:
    """Write new files; UserError, and nothing written, where one is there already."""
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already", "nothing is overwritten", "choose another name")
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
