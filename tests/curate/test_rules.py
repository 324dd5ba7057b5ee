"""Rules: everything is accounted for, limits hold, and cleaning twice changes nothing more."""

import json
import random
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate.rules import RULES, Knobs, chosen, clean, rules

GOOD = (
    "The keeper of the lighthouse had to climb the stairs every evening, and that was hard work in winter.\n"
    "He would carry the oil with him and fill the lamp before the sun went down behind the hills.\n"
    "Ships that came from the north could see its light from a distance of twenty miles or more.\n"
    "When the fog was thick, a bell had to be rung by hand until morning, which nobody liked.\n"
    "In later years a machine was built to turn the light, so that the keeper could sleep.\n"
)


def write(folder: Path, texts: list[str]) -> Data:
    file = folder / "d.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return Data(str(file))


def run(folder: Path, texts: list[str], **knobs) -> tuple[dict, list[dict], list[dict]]:
    facts = rules(Knobs(data=write(folder, texts), **knobs), folder)
    return facts, *([json.loads(line) for line in (folder / f).read_text().splitlines()] for f in ("dataset.jsonl", "removed.jsonl"))


BAD = {
    "gopher.words": "Too few words.",
    "gopher.hashes": GOOD + "# " * 30,
    "gopher.bullets": "".join(f"* {line}\n" for line in GOOD.splitlines()),
    "gopher.stop_words": " ".join(f"word{i}x rock stone hill" for i in range(30)),
    "gopher.duplicate_lines": GOOD + GOOD.splitlines()[0] * 0 + "one more line, said he.\n" * 9,
    "gopher.duplicate_10_grams": GOOD + " but " + GOOD[:200].replace("\n", " "),
    "c4.lorem_ipsum": GOOD + "Lorem ipsum dolor sit amet.",
    "c4.curly_bracket": GOOD + "function() { return }",
    "fineweb.line_breaks": GOOD + "\n" * 60,
    "kit.longest_word": GOOD + "x" * 57,
    "kit.replacement_characters": GOOD + "\ufffd" * 9,
}


@pytest.mark.parametrize("rule", BAD)
def test_each_rule_removes_what_it_is_for_and_not_a_good_text(tmp_path: Path, rule: str) -> None:
    _, kept, removed = run(tmp_path, [GOOD, BAD[rule]], use=[rule])
    assert [r["id"] for r in kept] == [0] and removed == [{"row": 1, "reason": rule, "flags": [rule]}]


def test_a_good_text_passes_all_rules_and_carries_all_signals(tmp_path: Path) -> None:
    _, kept, removed = run(tmp_path, [GOOD])
    assert not removed and {signal for signal, *_ in RULES.values()} < set(kept[0]) and kept[0]["reason"] == ""


def noise(n: int) -> list[str]:
    rng = random.Random(0)
    parts = [*GOOD.splitlines(), "x", "* item", "#", "...", "{", "", "ok", "12 34", "the the the the"]
    return [GOOD * (i % 4 == 0) + "\n".join(rng.choices(parts, k=rng.randint(0, 3 + 27 * (i % 4 > 0)))) for i in range(n)]


def test_every_removal_has_one_first_reason_and_all_its_flags_and_the_counts_close(tmp_path: Path) -> None:
    facts, kept, removed = run(tmp_path, noise(200))
    assert facts["kept"] + facts["removed"] == facts["documents"] == 200 and len(kept) == facts["kept"] > 0
    assert len(removed) == len({r["row"] for r in removed}) == facts["removed"] == sum(facts["first reasons"].values())
    order = list(RULES)
    for r in removed:
        assert r["reason"] == r["flags"][0] and r["flags"] == sorted(r["flags"], key=order.index)
    (tmp_path / "again").mkdir()
    _, scored, _ = run(tmp_path / "again", noise(200), drop=False)
    assert len(scored) == 200 and [r["id"] for r in scored if r["flags"]] == [r["row"] for r in removed]
    cut = {r["row"]: r["flags"] for r in removed}
    for r in scored:
        by_hand = [n for n, (s, low, high) in RULES.items() if not low - 1e-6 <= r[s] <= high + 1e-6]
        assert set(by_hand) <= set(cut.get(r["id"], []))


def test_limits_replace_a_source_s_and_skip_leaves_a_rule_out(tmp_path: Path) -> None:
    short = "The cat and the dog."
    assert [r["text"] for r in run(tmp_path, [short], use=["gopher.words"], limits={"gopher.words": [3, 9]})[1]] == [short]
    assert "gopher.words" not in chosen(Knobs(skip=["gopher.words"])) and not {
        n for n in chosen(Knobs(skip=["gopher"])) if n.startswith("gopher")
    }


def test_lines_are_taken_out_only_when_asked_and_cleaning_twice_is_cleaning_once(tmp_path: Path) -> None:
    text = GOOD + "Menu\nThis is known.[12] It was built by hand[edit].\nWe use cookies here.\n"
    assert run(tmp_path, [text], use=[])[1][0]["text"] == text
    found = run(tmp_path, [text], use=[], lines=True)[1][0]["text"]
    assert found == GOOD + "This is known. It was built by hand."
    for t in [*noise(60), "a b c.[[1]2]", "one two[1] three."]:
        assert clean(clean(t)) == clean(t)


def test_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path, noise(50))
    before = (tmp_path / "dataset.jsonl").read_bytes()
    run(tmp_path, noise(50))
    assert (tmp_path / "dataset.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("knobs", "say"),
    [({"use": ["gofer"]}, "no rule 'gofer'; did you mean 'gopher'"), ({"limits": {"c4.sentences": [5]}}, "the least and the most")],
)
def test_what_cannot_work_is_one_sentence(tmp_path: Path, knobs: dict, say: str) -> None:
    with pytest.raises(UserError, match=say):
        run(tmp_path, [GOOD], **knobs)
