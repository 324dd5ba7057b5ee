"""Recipes: strictness, overrides, paths, artifact flow."""

from pathlib import Path

import pytest

from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.runner import recipe

GOOD = """name: r
seed: 3
base: {base}
steps:
  - reshape.upcycle: {{experts: 4}}
  - tune.full: {{data: corpus.txt, train: {{lr: 1e-3}}}}
save: {{to: out/moe}}
"""


@pytest.fixture
def file(tmp_path: Path, tiny) -> Path:
    (tmp_path / "corpus.txt").write_text("words")
    (tmp_path / "r.yaml").write_text(GOOD.format(base=tiny("llama")))
    return tmp_path / "r.yaml"


def test_paths_are_relative_to_the_recipe_file(file: Path) -> None:
    r = recipe.read(file)
    assert r.save.to == str(file.parent / "out" / "moe")
    assert r.steps[1].knobs.data.path == str(file.parent / "corpus.txt")
    assert recipe.check(r) == []


def test_set_overrides_reach_any_depth(file: Path) -> None:
    r = recipe.read(
        file,
        [
            "steps.1.train.lr=3e-4",
            "steps.0.top_k=1",
            "seed=7",
            "save.shard_size=2M",
            "steps.1.data.column=text",
            "steps.1.train.tokens=300k",
        ],
    )
    assert (r.steps[1].knobs.train.lr, r.steps[0].knobs.top_k, r.seed, r.save.shard_size) == (3e-4, 1, 7, 2_000_000)
    assert (r.steps[1].knobs.data.column, r.steps[1].knobs.train.tokens) == ("text", 300_000)
    assert r.steps[1].knobs.data.path == str(file.parent / "corpus.txt"), "what was there stays"


def test_plain_recipe_reads_back_as_itself(file: Path) -> None:
    r = recipe.read(file)
    assert recipe.parse(r.plain()).plain() == r.plain()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [reshape.upcicle]", "did you mean 'reshape.upcycle'"),
        ("steps: [{reshape.upcycle: {expert: 4}}]", "did you mean 'experts'"),
        ("stepz: []", "did you mean 'steps'"),
        ("steps: []", "no steps"),
        ("steps: [{a: 1, b: 2}]", "one method"),
        ("[1, 2]", "not a mapping"),
        ("steps: [{reshape.upcycle: {experts: four}}]", "whole number"),
        ("steps: [{reshape.upcycle: {experts: 2.5}}]", "whole number"),
        ("steps: [{reshape.upcycle: {experts: true}}]", "whole number"),
        ("steps: [{reshape.upcycle: {experts: 1}}]", "at least 2"),
        ("steps: [{reshape.upcycle: {ratio: 1.5}}]", "between 0 and 1"),
        ("steps: [{reshape.upcycle: {method: spars}}]", "did you mean 'sparse'"),
        ("steps: [{tune.full: {train: {lr: .nan}}}]", "number"),
        ("steps: [{tune.full: {train: 3}}]", "mapping"),
        ("seed: -1\nsteps: [curate.stdlib]", "from 0 to 4294967295"),
        ("steps: [curate.stdlib]\nsteps: [curate.stdlib]", "stands twice"),
        ("steps: [curate.stdlib", "not valid YAML, line"),
        ("save: {too: x}\nsteps: [curate.stdlib]", "did you mean 'to'"),
    ],
)
def test_a_mistake_is_one_clear_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        recipe.read(tmp_path / "r.yaml")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("assignment", ["steps.9.experts=2", "steps.0=2", "nothing", "stepz.0.x=1", "steps.0.experts.deep=1"])
def test_a_wrong_override_is_refused(file: Path, assignment: str) -> None:
    with pytest.raises(UserError):
        recipe.read(file, [assignment])


def test_a_step_needs_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint"):
        recipe.check(recipe.parse({"steps": ["reshape.upcycle"]}))
    with pytest.raises(UserError, match="has no dataset"):
        recipe.check(recipe.parse({"base": "seedling", "steps": ["tune.full"]}))
    recipe.check(recipe.parse({"steps": ["curate.stdlib", "reshape.fresh", "tune.full"], "save": {"to": str(tmp_path / "x")}}))


@pytest.mark.parametrize("name", recipe.ready_recipes())
def test_ready_recipes_parse(name: str) -> None:
    assert recipe.read(name).steps


def test_unknown_step_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tune.lora'"):
        registry.entry("tune.lore")
