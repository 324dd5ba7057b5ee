"""Text of the Python installation: kinds, splits, held-out modules."""

import json
import re
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.curate.stdlib import Knobs, stdlib


def _rows(folder: Path, **knobs) -> list[dict]:
    stdlib(Knobs(**knobs), folder)
    return [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]


def test_train_and_held_out_are_disjoint_and_together_all(tmp_path: Path) -> None:
    names = {s: {r["name"] for r in _rows(tmp_path, parts=["topics", "source"], share=s)} for s in ("train", "heldout", "all")}
    assert not names["train"] & names["heldout"] and names["train"] | names["heldout"] == names["all"] and names["heldout"]


@pytest.mark.slow
def test_skipped_modules_are_left_out_whole(tmp_path: Path) -> None:
    rows = _rows(tmp_path, parts=["source", "docstrings"], skip=["json", "argparse"])
    assert not [r["name"] for r in rows if r["name"].split(":")[1].split(".")[0] in ("json", "argparse")]
    assert {r["name"].split(":")[1].split(".")[0] for r in _rows(tmp_path, parts=["source"], only=["json"])} == {"json"}


def test_docstrings_are_what_the_interpreter_shows(tmp_path: Path) -> None:
    import inspect
    import json as module

    text = {r["name"]: r["text"] for r in _rows(tmp_path, parts=["docstrings"], only=["json"])}["docstrings:json.__init__"]
    assert inspect.getdoc(module) in text and inspect.getdoc(module.dumps) in text


def test_unicode_names_are_right_and_rule_made_ones_absent(tmp_path: Path) -> None:
    text = "".join(r["text"] for r in _rows(tmp_path, parts=["unicode"]))
    assert "U+00E9 LATIN SMALL LETTER E WITH ACUTE\n" in text and not re.search(r"^U\+[0-9A-F]+ (CJK|HANGUL SYLLABLE)", text, re.M)


def test_the_character_limit_counts_per_kind(tmp_path: Path) -> None:
    facts = stdlib(Knobs(parts=["topics", "source"], characters=20_000), tmp_path)
    assert all(f["characters"] >= 20_000 and f["documents"] >= 1 for f in facts.values())


def test_unknown_part_and_empty_selection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known are"):
        stdlib(Knobs(parts=["poems"]), tmp_path)
    with pytest.raises(UserError, match="no text"):
        stdlib(Knobs(parts=["source"], only=["no_such_module"]), tmp_path)
