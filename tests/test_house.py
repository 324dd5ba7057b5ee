"""The house rules: imports run one way, files stay small, light commands stay light, every method is whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from matrix import ROWS
from modelwright import recipe, registry

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "modelwright"
FILES = sorted(SOURCE.rglob("*.py"))
FAMILIES = set(registry.FAMILIES)
MAY = {  # a part of the house -> the parts it may import
    "core": {"core"},
    "moe": {"core", "moe"},
    "models": {"core", "moe", "models"},
    **{f: {"core", "moe", "models", f} for f in FAMILIES},
    "registry": {"core"},
    "recipe": {"core", "registry"},
    "runner": {"core", "registry", "recipe", "drivers"},
    "drivers": {"core", "moe", "models", "registry", "recipe", "runner", "launch"},
    "launch": {"core", "registry", "recipe", "drivers"},
    "scaffold": {"core", "registry"},
    "preview": {"core", "registry", "recipe", "drivers"},
}
HEAVY_AT_HEAD = {"trl", "lightgbm", "ray", "lm_eval", "diffusers", "matplotlib", "sklearn", "scipy", "datasets", "vllm"}


def _imports(tree: ast.AST) -> set[str]:
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_run_one_way(file: Path) -> None:
    part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = MAY.get(part)
    if allowed is None:  # cli, demo and the package itself stand above everything
        assert part in ("cli", "demo", "__init__", "__main__")
        return
    for module in _imports(ast.parse(file.read_text())):
        if module.startswith("modelwright."):
            assert module.split(".")[1] in allowed, f"{file.name} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_heavy_optional_libraries_are_not_imported_at_the_head(file: Path) -> None:
    head = ast.Module([n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    assert not {m.split(".")[0] for m in _imports(head)} & HEAVY_AT_HEAD


def test_files_stay_within_their_budget() -> None:
    sizes = {f.relative_to(SOURCE): f.stat().st_size for f in FILES}
    assert max(sizes.values()) <= 20_000, max(sizes, key=lambda f: sizes[f])


def test_no_forbidden_dependency() -> None:
    for word in ("torchvision", "torchaudio", "xgboost", "hydra", "librosa"):
        assert word not in (ROOT / "pyproject.toml").read_text()
        assert word not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("e", registry.ENTRIES, ids=lambda e: e.name)
def test_every_entry_is_whole(e: registry.Entry) -> None:
    assert e.file.is_file() and registry.doc(e), "a file with a docstring"
    assert e.name in ROWS, "a row in tests/matrix.py"
    for proof in ROWS[e.name].proofs:
        assert (ROOT / proof).is_file(), "a proof"
    used = [s.entry.name for name in recipe.ready_recipes() for s in recipe.read(name).steps]
    assert e.name in used, "a recipe"
    assert f"`{e.name}`" in (ROOT / "PROOFS.md").read_text(), "a line in PROOFS.md"


@pytest.mark.parametrize("e", registry.ENTRIES, ids=lambda e: e.name)
def test_light_knobs_are_the_method_s_own(e: registry.Entry) -> None:
    import dataclasses
    import importlib

    module = importlib.import_module(e.object.split(":")[0])
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
        "import sys\nfrom modelwright.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'pyarrow', 'peft'}\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_torchvision_is_absent() -> None:
    """With a CPU build of torch, an installed torchvision breaks the import of every transformers model."""
    import importlib.util

    assert importlib.util.find_spec("torchvision") is None
