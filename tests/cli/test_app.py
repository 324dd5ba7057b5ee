"""The command line itself: help, hints, flags, and what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelwright import registry
from modelwright.cli import app as cli
from modelwright.cli import commands, output


def _call(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    return int(caught.value.code or 0)


@pytest.mark.parametrize("argv", [(), ("-h",), ("--help",), ("tune",), ("tune", "-h"), ("tune", "hft", "-h"), ("list", "-h")], ids=" ".join)
def test_help_is_no_error(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(*argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: modelwright") and not err


def test_empty_families_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    full = {e.family for e in registry.entries()}
    _call()
    shown = capsys.readouterr().out.split("Methods, by family")[1]
    _call("list")
    listed = capsys.readouterr().out
    for family, line in registry.FAMILIES.items():
        assert (line in shown) is (family in full) is (f"{family}: {line}" in listed)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sft"], "sft is tune.full or tune.lora here"),
        (["qlora"], "qlora is tune.lora here"),
        (["hft"], "hft is tune.hft here"),
        (["tune", "generate"], "generate is modelwright generate or cache.generate here"),
        (["show", "sft"], "sft is tune.full or tune.lora here"),
        (["show", "tune.openchat"], "openchat is tune.c_rlft here"),
        (["tune", "fine-tune"], "fine_tune is tune.full or tune.lora here"),
        (["lsit"], "did you mean 'list'?"),
    ],
)
def test_what_people_type_elsewhere_gets_the_right_hint(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(*argv) == 2
    assert words in capsys.readouterr().err


def test_every_alias_names_methods_and_commands_that_are_known() -> None:
    for word in registry.ALIASES:
        assert registry.hint(word) in (f"no method for {word} is here yet",) or registry.hint(word).startswith(f"{word} is ")
        for target in registry.ALIASES[word]:
            assert target.split(".")[0] in registry.FAMILIES or target.startswith("modelwright ")


def test_save_says_what_force_is_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    upcycle = ["reshape", "upcycle", "--base", "seedling", "--to", str(tmp_path / "o"), "--save"]
    meaning = "save a result whose certificate failed"
    for wrong in ("force", "force=perhaps", "force=1"):
        assert _call(*upcycle, wrong) == 2
        assert meaning in capsys.readouterr().err
    _call("reshape", "upcycle", "--help")
    assert "force=true saves a result whose certificate failed" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "o").exists()


def test_force_that_changes_nothing_is_noted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["judge", "continual", "--matrix", str(tmp_path / "none.json"), "--save", "force=true"]
    assert _call(*argv) == 2  # no such file
    assert "note: force=true changes nothing for judge.continual" in capsys.readouterr().err


def test_every_knob_has_a_flag_of_its_own() -> None:
    from modelwright.core.knobs import flat

    for e in registry.entries():
        leaves = [(n, f) for n, f in flat(registry.knobs(e)) if not f.metadata.get("argument")]
        taken = ["--base", "--to", "--seed", "--save", "--nproc", "--json", *(x for n, f in leaves for x in commands.flags(n, f))]
        assert len(taken) == len(set(taken)), e.name


def test_a_knob_answers_to_its_aliases() -> None:
    """The words of other libraries, where a knob names them; a dotted knob's alias stands in its place."""
    from dataclasses import field

    lr = field(default=1e-3, metadata={"alias": ("learning_rate",)})
    lr.type = float
    assert commands.flags("train.lr", lr) == ["--train.lr", "--train.learning-rate"]
    one = field(default=8, metadata={"alias": "rank"})
    one.type = int
    assert commands.flags("r", one) == ["--r", "--rank"]
    switch = field(default=True, metadata={})
    switch.type = bool
    assert commands.flags("train.record", switch) == ["--train.record/--no-train.record"]


def test_the_last_word_of_a_flag_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, flag in (("--lr", "--train.lr"), ("--epochs", "--train.epochs"), ("--column", "--data.column")):
        assert _call("tune", "full", "--base", "seedling", "--to", "x", typed, "1") == 2
        assert f"did you mean {flag}?" in capsys.readouterr().err


def test_printed_text_is_not_altered(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a[i] = b[j]", "[/INST]", "[bold]x[/]", "\\[red]", "a\ttab"):
        output.say(text)
        assert capsys.readouterr().out == text + "\n"


def test_an_error_is_one_line_whatever_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("a\nb", "a\x1b[31mb", "a\u202eb", "\udcff"):
        assert _call("show", bad) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("error: ") and "\x1b" not in err and "\u202e" not in err


def test_the_shell_completes_commands_methods_and_flags() -> None:
    def complete(words: str) -> str:
        asked = {"_MODELWRIGHT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        done = subprocess.run([sys.executable, "-m", "modelwright"], env=os.environ | asked, capture_output=True, text=True)
        assert not done.stderr, done.stderr
        return done.stdout

    assert "reshape" in complete("modelwright resh")
    assert "hft" in complete("modelwright tune h")
    assert "--granularity" in complete("modelwright tune hft --gran")
    assert not complete("modelwright nothing x").strip()


def test_json_answers_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["list", "--json"], ["show", "tune.hft", "--json"], ["show", "seedling", "--json"], ["check", "seedling", "--json"]):
        assert _call(*argv) == 0
        json.loads(capsys.readouterr().out)


def test_what_is_given_by_place_may_be_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from modelwright.testing import made

    file = made("matrix", tmp_path)["matrix"]
    said = []
    for argv in (["judge", "continual", "--matrix", file, "--json"], ["reward", "bench", "--suite", "nosuch", "--scores", str(tmp_path)]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        said.append((end.value.code or 0, capsys.readouterr()))
    assert said[0][0] == 0 and said[1][0] == 2 and "suite='nosuch' is not a choice" in said[1][1].err
