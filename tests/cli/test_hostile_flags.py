"""What people type for numbers, paths and YAML on the command line: one sentence and exit code 2, whatever it is."""

from pathlib import Path

import pytest

from modelwright.cli import app as cli

LONG, DIGITS = "a" * 5000, "9" * 5000
UPCYCLE = ["reshape", "upcycle", "--base", "/nowhere", "--to", "OUT"]
FRESH = ["reshape", "fresh", "--to", "OUT"]
CHECK = ["check", "sparse-upcycling"]
# Values that once ended in a traceback.
MENDED: dict[str, list[str]] = {
    "a number of 5,000 digits in YAML": [*UPCYCLE, "--save", f"shard_size={DIGITS}"],
    "a number of 401 digits in YAML": [*UPCYCLE, "--save", "shard_size=1" + "0" * 400],
    "an exponent beyond decimal": [*UPCYCLE, "--router-std", "1e5000000k"],
    "a word tagged as a whole number": [*UPCYCLE, "--prompts", "!!int x"],
    "a word tagged as a number": [*UPCYCLE, "--prompts", "!!float x"],
    "a word tagged as a time": [*UPCYCLE, "--prompts", "!!timestamp x"],
    "a month that is none": [*UPCYCLE, "--prompts", "2020-13-45"],
    "a raised digit for a step": [*CHECK, "--set", "steps.².x=1"],
    "a step of 5,000 digits": [*CHECK, "--set", f"steps.{DIGITS}.x=1"],
    "a base of 5,000 letters": ["reshape", "upcycle", "--base", LONG, "--to", "OUT"],
    "data of 5,000 letters": [*FRESH, "--data", LONG],
    "data of 1,500 brackets": [*FRESH, "--data", "[" * 1500],
    "a recipe of 5,000 letters": ["check", LONG],
    "data of an unknown user": [*FRESH, "--data", "~nosuchuser/x"],
    "a base of an unknown user": ["reshape", "upcycle", "--base", "~nosuchuser", "--to", "OUT"],
    "a target of an unknown user": ["reshape", "upcycle", "--base", "/nowhere", "--to", "~nosuchuser"],
    "a recipe that cannot be read": ["check", "/proc/self/mem"],
}
HELD: dict[str, list[str]] = {  # these are one sentence already
    "a number of 5,000 digits": [*UPCYCLE, "--experts", DIGITS],
    "beyond the range of floats": [*UPCYCLE, "--router-std", "1e999"],
    "not a number": [*UPCYCLE, "--router-std", "nan"],
    "a suffix alone": [*UPCYCLE, "--experts", "k"],
    "nothing for a number": [*UPCYCLE, "--experts", ""],
    "full-width digits for a choice": [*UPCYCLE, "--method", "１２"],
    "a seed of 5,000 digits": [*UPCYCLE, "--seed", DIGITS],
    "a bracket that never closes": [*UPCYCLE, "--prompts", "["],
    "a merge key of a list": [*UPCYCLE, "--prompts", "{<<: [1]}"],
    "an alias without an anchor": [*UPCYCLE, "--prompts", "*a"],
    "a tag of its own": [*UPCYCLE, "--prompts", "!x y"],
    "a list for a key": [*UPCYCLE, "--prompts", "{? [a] : b}"],
    "no step": [*CHECK, "--set", "steps.-1.x=1"],
    "an empty key": [*CHECK, "--set", ".=1"],
    "nothing": [*CHECK, "--set", ""],
    "below a plain value": [*CHECK, "--set", "seed.x=1"],
    "a step that is a number": [*CHECK, "--set", "steps=3"],
    "a recipe that is a folder": ["check", "/"],
    "a name with a line break": ["show", "a\nb"],
    "a lone surrogate": ["show", "\udcff"],
    "an escape sequence": ["show", "\x1b[31mred"],
    "an emoji for a method": ["tune", "💥"],
    "a save without a value": [*UPCYCLE, "--save", "shard_size"],
    "a save with nothing": [*UPCYCLE, "--save", "="],
}


def _refused(argv: list[str], room: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([a.replace("OUT", str(room / "out")) for a in argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert not list(room.iterdir()), "something was written"
    return err


@pytest.mark.parametrize("kind", HELD)
def test_a_hostile_flag_is_one_sentence(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(HELD[kind], tmp_path, capsys)


@pytest.mark.parametrize("kind", MENDED)
def test_a_hostile_value_that_was_a_traceback_is_one_sentence(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(MENDED[kind], tmp_path, capsys)


def test_a_long_value_is_cut_to_a_readable_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_refused([*UPCYCLE, "--experts", "x" * 5000], tmp_path, capsys)) < 500
