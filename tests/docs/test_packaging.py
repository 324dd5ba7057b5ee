"""What the package says of itself: extras, citation, what goes into a source distribution."""

import re
import tomllib
from pathlib import Path

import yaml

import modelwright

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"nvidia-ml-py": "pynvml", "scikit-learn": "sklearn"}  # where a package's module has another name


def _named(package: str) -> str:
    return re.split(r"[\s<>=!~;\[]", package)[0]


def test_extras_name_only_what_the_code_uses() -> None:
    source = "\n".join(f.read_text() for f in (ROOT / "src").rglob("*.py"))
    for extra, packages in PROJECT["optional-dependencies"].items():
        for package in map(_named, packages if extra not in ("dev", "docs") else []):
            module = MODULES.get(package, package.replace("-", "_"))
            assert re.search(rf"\b{module}\b", source), f"nothing uses {package} of the extra '{extra}'"


def test_citation_has_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == modelwright.__version__ and cited["license"] == PROJECT["license"]


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert modelwright.__version__ in first


def test_a_source_distribution_has_what_the_tests_need() -> None:
    lines = (ROOT / "MANIFEST.in").read_text().split("\n")
    taken = {word for line in lines if line.startswith(("graft ", "include ")) for word in line.split()[1:]}
    assert {"tests", "docs", "bench", "PROOFS.md", "constraints.txt", "mkdocs.yml", "CITATION.cff", "CHANGELOG.md"} <= taken
    for file in taken:
        assert (ROOT / file).exists(), file
