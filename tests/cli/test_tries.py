"""try: every method of the registry runs on the embedded model with one command and shows its report."""

import json
from pathlib import Path

import pytest

from modelwright import registry
from modelwright.cli import app as cli
from modelwright.cli.tries import SAMPLES, recipe_of
from modelwright.runner.recipe import check


def _call(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("e", registry.METHODS, ids=lambda e: e.name)
def test_every_method_has_something_to_be_tried_on(e: registry.Entry, tmp_path: Path) -> None:
    recipe = recipe_of(e, [], tmp_path, 0)
    assert check(recipe) == [] and recipe.steps[-1].entry == e


def test_samples_name_methods_that_are_there() -> None:
    assert SAMPLES.keys() <= {e.name for e in registry.METHODS}


@pytest.mark.slow
@pytest.mark.parametrize("e", registry.entries(), ids=lambda e: e.name)
def test_every_method_can_be_tried(e: registry.Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--set", "train.tokens=2k"] if e.family == "tune" else []
    assert _call("try", e.name, "--to", tmp_path / "t", "--json", *short) == 0
    shown = json.loads(capsys.readouterr().out)
    assert Path(shown["report"]).stat().st_size > 2000 and shown["steps"][-1]["step"] == e.name


def test_a_try_shows_its_report_and_leaves_the_next_one_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for n in ("", "-2"):
        assert _call("try", "judge.select", "--set", "n=4") == 0
        report = tmp_path / f"out/try/judge.select{n}/result/report.html"
        assert report.is_file() and f"report  {report}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tune.hfd"], "did you mean 'tune.hft'?"),
        (["sft"], "tune.full"),
        (["judge.select", "--set", "m=4"], "unknown key"),
        (["judge.select", "--set", "n"], "no '='"),
        (["judge.select", "--set", "n=0"], "out of range"),
        (["judge.select", "--to", "."], "exists already"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence_and_leaves_nothing(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call("try", *argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
