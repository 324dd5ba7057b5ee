"""The rules of the architecture: imports run down and in no circle, a family lists its methods, files are small, light commands light."""

import ast
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from matrix import ROWS
from modelwright import registry
from modelwright.runner import recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "modelwright"
FILES = sorted(SOURCE.rglob("*.py"))
FAMILIES = set(registry.FAMILIES)
MAY = {  # a package -> the packages it may import
    "core": {"core"},
    "moe": {"core", "moe"},
    "models": {"core", "moe", "models"},
    **{f: {"core", "moe", "models", f} for f in FAMILIES},
    "registry": {"core", "registry"},
    "runner": {"core", "moe", "models", "registry", "runner"},
    "testing": {"core", "registry", "runner", "testing"},
}
INSIDE_CORE = {  # a package of core -> what of core it may import
    "numbers": {"numbers", "errors"},
    "report": {"report", "numbers", "errors", "model"},  # a report shows certificates
    "data": {"data", "report", "numbers", "errors", "knobs", "files"},
    "model": {"model", "report", "numbers", "errors", "knobs", "files"},
    "ask": {"ask", "model", "report", "numbers", "errors", "knobs", "files", "step"},
    "train": {"train", "model", "data", "report", "numbers", "errors", "knobs", "files"},
}
HEAVY_AT_HEAD = {
    "trl",
    "lightgbm",
    "ray",
    "lm_eval",
    "diffusers",
    "matplotlib",
    "sklearn",
    "scipy",
    "datasets",
    "vllm",
    "openai",
    "bitsandbytes",
}


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _imports(tree: ast.AST) -> set[str]:
    """Modules named by imports anywhere in the file, also inside functions; `from a import b` names a.b too."""
    found: set[str] = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module:
            found |= {n.module, *(f"{n.module}.{a.name}" for a in n.names)}
        elif isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
    return found


def _name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_run_one_way(file: Path) -> None:
    part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = MAY.get(part)
    if allowed is None:  # the command line and the package itself stand above everything
        assert part in ("cli", "__init__", "__main__")
        return
    for module in _imports(_tree(file)):
        if module.startswith("modelwright.") and module.split(".")[1] in {*MAY, "cli"}:
            assert module.split(".")[1] in allowed, f"{file.name} imports {module}"


@pytest.mark.parametrize("file", sorted((SOURCE / "core").rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_inside_the_kernel_run_down(file: Path) -> None:
    allowed = INSIDE_CORE.get(file.relative_to(SOURCE / "core").parts[0])
    if allowed is None:
        return
    for module in _imports(_tree(file)):
        if module.startswith("modelwright.core.") and module.split(".")[2] in {*INSIDE_CORE, "errors", "knobs", "files", "step"}:
            assert module.split(".")[2] in allowed, f"{file.name} imports {module}"


def test_no_file_lies_on_an_import_circle() -> None:
    names = {_name(f): f for f in FILES}
    graph = {n: {m for m in _imports(_tree(f)) if m in names and m != n and names[m].name != "__init__.py"} for n, f in names.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    assert [n for n in graph if n in reached(n)] == []


def test_a_family_lists_its_methods_and_nothing_else() -> None:
    files = {f"{family}.{f.stem}" for family in FAMILIES for f in (SOURCE / family).glob("*.py") if f.stem != "__init__"}
    assert files == {e.name for e in registry.METHODS}
    assert all(e.module == f"modelwright.{e.name}" for e in registry.METHODS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_heavy_optional_libraries_are_not_imported_at_the_head(file: Path) -> None:
    head = ast.Module([n for n in _tree(file).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    assert not {m.split(".")[0] for m in _imports(head)} & HEAVY_AT_HEAD


def test_files_stay_within_their_budget() -> None:
    sizes = {f.relative_to(SOURCE): f.stat().st_size for f in FILES if f.name != "__init__.py"}
    assert max(sizes.values()) <= 20_000, max(sizes, key=lambda f: sizes[f])
    assert statistics.median(sizes.values()) <= 7_000


def test_no_forbidden_dependency() -> None:
    for word in ("torchvision", "torchaudio", "xgboost", "hydra", "librosa"):
        assert word not in (ROOT / "pyproject.toml").read_text()
        assert word not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("e", registry.METHODS, ids=lambda e: e.name)
def test_every_entry_is_whole(e: registry.Entry) -> None:
    assert e.file.is_file() and registry.doc(e), "a file with a docstring"
    assert e.name in ROWS, "a row in tests/matrix.py"
    for proof in ROWS[e.name].proofs:
        assert (ROOT / proof).is_file(), "a proof"
    used = [s.entry.name for name in recipe.ready_recipes() for s in recipe.read(name).steps]
    assert e.name in used, "a recipe"
    assert f"`{e.name}`" in (ROOT / "PROOFS.md").read_text(), "a line in PROOFS.md"


@pytest.mark.parametrize("e", registry.METHODS, ids=lambda e: e.name)
def test_light_knobs_are_the_method_s_own(e: registry.Entry) -> None:
    import dataclasses
    import importlib

    module = importlib.import_module(e.module)
    own, light = dataclasses.fields(module.Knobs), dataclasses.fields(registry.knobs(e))
    assert [(f.name, str(f.type), str(f.default), dict(f.metadata)) for f in own] == [
        (f.name, str(f.type), str(f.default), dict(f.metadata)) for f in light
    ]
    assert all(f.metadata.get("help") for f in light), "every knob says what it means"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["list", "--json"],
        ["check", "seedling"],
        ["show", "reshape.upcycle"],
        ["reshape", "upcycle", "--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_light_commands_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom modelwright.cli.app import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'pyarrow', 'peft'}\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names_are_shown_and_work() -> None:
    import modelwright

    assert set(modelwright.__all__) <= set(dir(modelwright))
    for name in modelwright.__all__:
        assert getattr(modelwright, name).__module__.startswith("modelwright."), name
    assert callable(modelwright.run), "no package of ours takes the name of the function"


def test_torchvision_is_absent() -> None:
    """With a CPU build of torch, an installed torchvision breaks the import of every transformers model."""
    import importlib.util

    assert importlib.util.find_spec("torchvision") is None
