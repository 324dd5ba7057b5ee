"""What people type for numbers, paths and YAML on the command line: one sentence and exit code 2, whatever it is."""

from pathlib import Path

import pytest

from modelwright.cli import app as cli

LONG, DIGITS = "a" * 5000, "9" * 5000
UPCYCLE = ["reshape", "upcycle", "--base", "/nowhere", "--to", "OUT"]
FRESH = ["reshape", "fresh", "--to", "OUT"]
CHECK = ["check", "sparse-upcycling"]
# The inputs that end in a traceback today: the command, and the traceback.
OPEN: dict[str, tuple[list[str], str]] = {
    "a number of 5,000 digits in YAML": (
        [*UPCYCLE, "--save", f"shard_size={DIGITS}"],
        "runner/recipe.py:82 read_yaml: ValueError: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "a number of 401 digits in YAML": (
        [*UPCYCLE, "--save", "shard_size=1" + "0" * 400],
        "core/knobs.py:96 number: OverflowError: int too large to convert to float",
    ),
    "an exponent beyond decimal": (
        [*UPCYCLE, "--router-std", "1e5000000k"],
        "core/knobs.py:94 number: decimal.Overflow: [<class 'decimal.Overflow'>]",
    ),
    "a word tagged as a whole number": (
        [*UPCYCLE, "--prompts", "!!int x"],
        "runner/recipe.py:82 read_yaml: ValueError: invalid literal for int() with base 10: 'x'",
    ),
    "a word tagged as a number": (
        [*UPCYCLE, "--prompts", "!!float x"],
        "runner/recipe.py:82 read_yaml: ValueError: could not convert string to float: 'x'",
    ),
    "a word tagged as a time": (
        [*UPCYCLE, "--prompts", "!!timestamp x"],
        "runner/recipe.py:82 read_yaml: AttributeError: 'NoneType' object has no attribute 'groupdict'",
    ),
    "a month that is none": ([*UPCYCLE, "--prompts", "2020-13-45"], "runner/recipe.py:82 read_yaml: ValueError: month must be in 1..12"),
    "a raised digit for a step": (
        [*CHECK, "--set", "steps.².x=1"],
        "runner/recipe.py:109 override: ValueError: invalid literal for int() with base 10: '²' (isdigit is true for it)",
    ),
    "a step of 5,000 digits": (
        [*CHECK, "--set", f"steps.{DIGITS}.x=1"],
        "runner/recipe.py:109 override: ValueError: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "a base of 5,000 letters": (
        ["reshape", "upcycle", "--base", LONG, "--to", "OUT"],
        "core/knobs.py:204 resolve: OSError: [Errno 36] File name too long",
    ),
    "data of 5,000 letters": ([*FRESH, "--data", LONG], "core/knobs.py:204 resolve: OSError: [Errno 36] File name too long"),
    "data of 1,500 brackets": (
        [*FRESH, "--data", "[" * 1500],
        "runner/recipe.py:190 check: OSError: [Errno 36] File name too long",
    ),
    "a recipe of 5,000 letters": (["check", LONG], "runner/recipe.py:161 read: OSError: [Errno 36] File name too long"),
    "data of an unknown user": (
        [*FRESH, "--data", "~nosuchuser/x"],
        "core/knobs.py:203 resolve: RuntimeError: Could not determine home directory.",
    ),
    "a base of an unknown user": (
        ["reshape", "upcycle", "--base", "~nosuchuser", "--to", "OUT"],
        "core/knobs.py:203 resolve: RuntimeError: Could not determine home directory.",
    ),
    "a target of an unknown user": (
        ["reshape", "upcycle", "--base", "/nowhere", "--to", "~nosuchuser"],
        "runner/recipe.py:151 parse: RuntimeError: Could not determine home directory.",
    ),
    "a recipe that cannot be read": (["check", "/proc/self/mem"], "runner/recipe.py:166 read: OSError: [Errno 5] Input/output error"),
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


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.xfail(strict=True, reason=why)) for k, (_, why) in OPEN.items()])
def test_a_hostile_flag_that_still_is_a_traceback(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(OPEN[kind][0], tmp_path, capsys)


@pytest.mark.xfail(strict=True, reason="core/errors.py: a value in a message is not cut to a readable length")
def test_a_long_value_is_cut_to_a_readable_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_refused([*UPCYCLE, "--experts", "x" * 5000], tmp_path, capsys)) < 500
