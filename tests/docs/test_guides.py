"""What the guides say works: every command parses, and those marked for it run on a tiny model.

Costs about 20 CPU seconds: some twenty real commands, each with its certificate, the guides being what a person types first.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_blocks import GUIDES, Block, blocks

from modelwright import registry
from modelwright.cli import app
from modelwright.core.errors import UserError
from modelwright.runner import recipe as recipes
from modelwright.runner import run as runs

ALL = sorted(GUIDES.glob("*.md"))
ROOT = GUIDES.parents[1]
OTHER_TOOLS = {"pip", "vllm", "lm_eval", "srun", "export", "make", "git", "python", "pre-commit"}


def _ids(guide: Path) -> str:
    return guide.stem


def _small(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with a few short training steps instead of many."""
    steps = []
    for step in recipe.steps:
        train = getattr(step.knobs, "train", None)
        if train is not None:
            short = dataclasses.replace(train, tokens=128, epochs=1.0, batch=2, context=32, accumulate=1)
            step = dataclasses.replace(step, knobs=dataclasses.replace(step.knobs, train=short))
        steps.append(step)
    return dataclasses.replace(recipe, steps=steps)


def _call(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app.main(words[1:])
    assert not end.value.code, words


class Understood(Exception):
    """Stands for the run of a recipe that was understood."""


def _parses(words: list[str], monkeypatch: pytest.MonkeyPatch, given: Path) -> None:
    """A command is understood: its method, its flags and their values. Files that it names need not be there."""
    if words[:2] == ["modelwright", "new"]:
        assert words[2] in registry.FAMILIES and words[4::2] in ([], ["--package"])
        return

    def understood(*recipe: Any, **more: Any) -> None:
        raise Understood

    with monkeypatch.context() as patched:
        patched.setattr(runs, "run_recipe", understood)
        patched.setattr(recipes, "check", lambda recipe: [])
        patched.setattr(recipes, "read", lambda path, sets=(): recipes.parse(yaml.safe_load(given.read_text())))
        if words[1] in ("list", "show", "check", "--version"):
            _call([w for w in words if w != "--deep"])  # which would load the base
            return
        with pytest.raises((Understood, SystemExit)) as end:
            app.main(words[1:])
    assert end.type is Understood, words


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A recipe that stands for any that a guide names."""
    file = tmp_path / "any.yaml"
    file.write_text("{base: seedling, steps: [{reshape.upcycle: {}}, {tune.full: {data: {path: corpus.txt}}}]}")
    return file


@pytest.mark.parametrize("guide", [*ALL, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md"], ids=_ids)
def test_every_block_parses(guide: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(guide)
    assert guide.read_text().count("\n```") == 2 * len(found), "a block was not understood"
    for block in found:
        if block.language == "python":
            compile(block.text, str(guide), "exec")
        elif block.language == "yaml":
            recipes.parse(yaml.safe_load(block.text))
        elif block.language == "sh":
            for words in block.commands():
                if words[0] == "modelwright":
                    _parses(words, monkeypatch, given)
                else:
                    assert words[0] in OTHER_TOOLS, f"{words[0]} is no tool that the guides may name"


def _runs(guide: Path) -> bool:
    return any(b.what == "run" for b in blocks(guide))


@pytest.mark.slow
@pytest.mark.parametrize("guide", filter(_runs, ALL), ids=_ids)
def test_marked_blocks_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = runs.run_recipe
    monkeypatch.setattr(runs, "run_recipe", lambda recipe, *more, **named: real(_small(recipe), *more, **named))
    for block in blocks(guide):
        _do(block)


def _do(block: Block) -> None:
    if block.what.startswith("file "):
        Path(block.what.removeprefix("file ")).write_text(block.text)
    elif block.what == "run" and block.language == "python":
        exec(compile(block.text, "guide", "exec"), {"__name__": "guide"})
    elif block.what == "run":
        for words in block.commands():
            _call(words)


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nmodelwright tune hft --base seedling --dta x.txt --to out\n```",
        "```sh\nmodelwright tune hst --base seedling --to out\n```",
        "```sh\nmodelwright tune hft --base seedling --data x.txt --train.lr fast --to out\n```",
        "```sh\nmodelwrite tune hft\n```",
        "```yaml\nsteps: [{tune.hft: {dat: x.txt}}]\n```",
        "```python\nfrom modelwright import\n```",
        "```sh\nmodelwright list\n",
    ],
)
def test_a_block_that_does_not_parse_is_found(text: str, tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "guide.md"
    page.write_text(f"text\n\n{text}\n")
    with pytest.raises((AssertionError, SyntaxError, UserError)):
        test_every_block_parses(page, given, monkeypatch)


def test_every_guide_is_in_the_index_and_the_menu() -> None:
    index, menu, readme = ((ROOT / name).read_text() for name in ("docs/index.md", "mkdocs.yml", "README.md"))
    for guide in ALL:
        assert all(f"guides/{guide.name}" in text for text in (index, menu, readme))
