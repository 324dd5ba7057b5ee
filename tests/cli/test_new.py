"""`modelwright new` writes stubs that import, and a test that fails until it is written."""

import ast
import shutil
from pathlib import Path

import pytest

from modelwright.cli.new import scaffold
from modelwright.core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    house = tmp_path / "src" / "modelwright"
    for d in ("tune", "reshape", "recipes"):
        (house / d).mkdir(parents=True)
    shutil.copy(ROOT / "src" / "modelwright" / "registry.py", house / "registry.py")
    return tmp_path


@pytest.mark.parametrize("family", ["tune", "reshape"])
def test_new_method_is_registered_and_parses(checkout: Path, family: str) -> None:
    files = scaffold(family, "my_method", checkout)
    for file in files:
        if file.suffix == ".py":
            ast.parse(file.read_text())
    space: dict = {"__file__": str(checkout / "src/modelwright/registry.py"), "__name__": "copied_registry"}
    import sys
    import types

    sys.modules["copied_registry"] = types.ModuleType("copied_registry")
    exec((checkout / "src/modelwright/registry.py").read_text(), space)
    entry = space["entry"](f"{family}.my_method")
    assert (
        entry.module == f"modelwright.{family}.my_method" and "TITLE" in (checkout / f"src/modelwright/{family}/my_method.py").read_text()
    )
    assert f"{family}.my_method" in (checkout / "src/modelwright/recipes/my_method.yaml").read_text()


def test_nothing_is_overwritten_and_bad_names_are_refused(checkout: Path) -> None:
    scaffold("tune", "one", checkout)
    before = (checkout / "src/modelwright/registry.py").read_text()
    for family, name in (("tune", "one"), ("tune", "Bad Name"), ("tuna", "x"), ("tune", "lora")):
        with pytest.raises(UserError):
            scaffold(family, name, checkout)
    assert (checkout / "src/modelwright/registry.py").read_text() == before
    with pytest.raises(UserError, match="no checkout"):
        scaffold("tune", "two", checkout / "src")
