"""`modelwright new`: stubs for every family that are whole at once, and packages that are found when they are installed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelwright import registry
from modelwright.cli import app as cli
from modelwright.cli.new import scaffold, scaffold_package
from modelwright.core.errors import UserError

ROOT = Path(__file__).parents[2]
FAMILIES = list(registry.FAMILIES)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of a checkout that `new` adds to."""
    for name in ("src/modelwright/registry/table.py", "tests/matrix.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _python(*argv: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)


# ---- in a checkout ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_method_has_all_that_the_checklist_asks_for(checkout: Path, family: str) -> None:
    files = {str(f.relative_to(checkout)): f.read_text() for f in scaffold(family, "my_method", checkout)}
    name = f"{family}.my_method"
    for file, text in files.items():
        if file.endswith(".py"):
            ast.parse(text)
            assert max(map(len, text.splitlines())) <= 140 or file.endswith("registry/table.py")
    assert "METHOD = " in files[f"src/modelwright/{family}/my_method.py"].splitlines()[-1]
    assert f'    method("{name}", ' in files["src/modelwright/registry/table.py"]
    assert f'"{name}": Row(' in files["tests/matrix.py"]
    assert f"- {name}: " in files["src/modelwright/recipes/my-method.yaml"]
    assert re.search(rf'check_method\(\s*"{name}"', files[f"tests/{family}/test_my_method.py"])
    assert 'save("my_method"' in files["bench/my_method.py"]


@pytest.mark.slow
def test_new_methods_of_every_family_pass_the_tests_of_the_checkout(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "out"))
    for family in FAMILIES:
        scaffold(family, f"my_{family}", root)
    mine = " or ".join(f"{f}.my_{f}" for f in FAMILIES)
    house = _python(
        *"-m pytest -q -n 0 -p no:cacheprovider tests/test_house.py tests/test_matrix.py -k".split(),
        f"lists_its_methods or (({mine}) and not imports)",
        path=[root / "src", root / "tests"],
        cwd=root,
    )
    assert house.returncode == 0, house.stdout[-3000:]
    stub = _python(*"-m pytest -q -n 0 tests/tune/test_my_tune.py -k proven".split(), path=[root / "src", root / "tests"], cwd=root)
    assert stub.returncode == 1 and "write the first invariant of tune.my_tune" in stub.stdout, "unproven until it is written"
    if ruff := shutil.which("ruff", path=str(Path(sys.executable).parent)):
        mine = [str(p) for p in root.rglob("*my_*.py")]
        for lint in (["check"], ["format", "--check"]):
            done = subprocess.run([ruff, *lint, *mine], cwd=root, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_overwritten_and_bad_names_are_refused(checkout: Path) -> None:
    scaffold("tune", "one", checkout)
    before = {p: p.read_text() for p in checkout.rglob("*") if p.is_file()}
    for family, name in (("tune", "one"), ("tune", "Bad Name"), ("tune", "class"), ("tuna", "x"), ("tune", "lora")):
        with pytest.raises(UserError):
            scaffold(family, name, checkout)
    with pytest.raises(UserError, match="no checkout"):
        scaffold("tune", "two", checkout / "src")
    assert {p: p.read_text() for p in checkout.rglob("*") if p.is_file()} == before


# ---- as a package ----------------------------------------------------------------------------------------------------
def _install(package: Path, site: Path) -> None:
    """With pip, alone and offline, into a folder of its own."""
    argv = "-m pip install -q --no-deps --no-build-isolation --no-index --disable-pip-version-check --target".split()
    done = subprocess.run([sys.executable, *argv, site, package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package with a tune method, written by `new` and installed: its folder, and where it is installed."""
    pytest.importorskip("setuptools")
    root = tmp_path_factory.mktemp("package")
    scaffold_package("my_methods", "tune", "calm", root)
    init = root / "my_methods" / "src" / "my_methods" / "__init__.py"
    init.write_text(init.read_text() + "\nimport torch  # a package whose import is slow\n")
    _install(root / "my_methods", root / "site")
    return root / "my_methods", root / "site"


def test_an_installed_package_is_found_and_read_without_importing_it(installed: tuple[Path, Path], tmp_path: Path) -> None:
    package, site = installed
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: seedling\nsteps: [tune.calm: {data: x.txt, frozen: norm}]\nsave: {to: out}\n")
    (tmp_path / "x.txt").write_text("text")
    code = (
        "import sys, json\nfrom modelwright.cli.app import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    try: main(argv)\n    except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'my_methods', 'torch', 'numpy'} & set(sys.modules)"
    )
    calls = [["list"], ["show", "tune.calm"], ["tune", "--help"], ["tune", "calm", "--help"], ["check", str(recipe)]]
    done = _python("-c", code, json.dumps(calls), path=[ROOT / "src", site], cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    shown = done.stdout
    assert "tune.calm  " in shown and "  calm " in shown and "--frozen TEXT" in shown and "parameters with this word" in shown
    assert "is fine: tune.calm" in shown


@pytest.mark.slow
def test_an_installed_package_passes_its_own_test_and_runs_from_a_recipe(installed: tuple[Path, Path], tmp_path: Path) -> None:
    package, site = installed
    tests = _python(*"-m pytest -q -p no:cacheprovider".split(), str(package / "tests"), path=[ROOT / "src", site], cwd=package)
    assert tests.returncode == 0, tests.stdout[-3000:]
    (tmp_path / "corpus.txt").write_text("one two three\n" * 200)
    shutil.copy(package / "recipe.yaml", tmp_path / "recipe.yaml")
    argv = "-m modelwright run recipe.yaml --json --set steps.0.train.tokens=128 --set steps.0.train.context=32".split()
    done = _python(*argv, path=[ROOT / "src", site], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"][0]["step"] == "tune.calm"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_package_may_hold_a_method_of_any_family(tmp_path: Path, family: str) -> None:
    files = scaffold_package("mine", family, "some", tmp_path)
    assert all(f.suffix != ".py" or ast.parse(f.read_text()) for f in files)
    assert f'"{family}.some"' in (tmp_path / "mine/src/mine/__init__.py").read_text()
    for wrong in ("mine", "Mine", "my-package", "modelwright", "3"):
        with pytest.raises(UserError):
            scaffold_package(wrong, family, "some", tmp_path)


# ---- packages that are broken ----------------------------------------------------------------------------------------
GOOD = '''"""A method."""
from dataclasses import dataclass
from modelwright.core.knobs import knob

@dataclass(frozen=True)
class Knobs:
    n: int = knob(1, "n")
'''
TABLE = "from modelwright.registry import MEASURES, method\nMETHODS = [method({0}, 'line', 'ours', MEASURES, module='broken.it')]\n"
BROKEN = {
    "its import fails": ("METHODS = [1 / 0]", GOOD, "ZeroDivisionError"),
    "it needs a module that is not there": ("from nowhere import METHODS", GOOD, "nowhere"),
    "its table is no list of methods": ("METHODS = [3]", GOOD, "no method of a family"),
    "its family is unknown": (TABLE.format("'magic.it'"), GOOD, "no method of a family"),
    "its name is taken": (TABLE.format("'tune.hft'"), GOOD, "tune.hft exists already"),
    "its method has no file": (TABLE.format("'inspect.it'"), None, "inspect.it has no file"),
    "its table does not parse": ("METHODS = [", GOOD, "never closed"),
    "it has no table": ("", GOOD, "METHODS"),
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """broken(init, method) puts an installed package with these two files on the path."""

    def make(init: str, method: str | None) -> None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "__init__.py").write_text(init)
        if method is not None:
            (tmp_path / "broken" / "it.py").write_text(method)
        (tmp_path / "broken-1.dist-info").mkdir()
        (tmp_path / "broken-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
        (tmp_path / "broken-1.dist-info" / "entry_points.txt").write_text("[modelwright.methods]\nbroken = broken:METHODS\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        registry.installed.cache_clear()

    yield make
    monkeypatch.undo()
    sys.modules.pop("broken", None)
    registry.installed.cache_clear()


def _call(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    return int(caught.value.code or 0)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package_is_one_note_and_the_command_line_stays(broken, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    init, method, words = BROKEN[fault]
    broken(init, method)
    for argv in (["list"], ["tune", "--help"], ["check", "seedling"], []):
        assert _call(*argv) == 0
        out, err = capsys.readouterr()
        assert out and err.count("\n") == 1 and err.startswith("note: the methods of broken:METHODS are left out: ")
        assert words in err


@pytest.mark.parametrize("method", ["", "def (", '"""x"""\nclass Knobs: pass\n', GOOD.replace("n: int", "n: Undefined")])
def test_a_method_whose_knobs_cannot_be_read_is_one_sentence(broken, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken(TABLE.format("'inspect.it'"), method)
    for argv in (["list"], ["--help"], ["inspect", "--help"]):
        assert _call(*argv) == 0
    capsys.readouterr()
    for argv in (["show", "inspect.it"], ["inspect", "it", "--help"]):
        assert _call(*argv) == 2
        assert capsys.readouterr().err.startswith("error: the settings of inspect.it cannot be read")
