"""OpenBezoar's parts: each row says where it is from, nothing unknown is kept, nothing is lost without a reason."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from modelwright.core.ask.protocol import Answer
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate import evol, judge_filter, lamini, orca
from modelwright.curate.generators.eliminate import instruction_fault, response_fault
from modelwright.curate.generators.replies import numbered, one_word
from modelwright.curate.generators.rows import SAMPLE, Row, read_rows, template
from modelwright.runner.run import run
from modelwright.testing import write_jsonl

TWIN = {"data": "openbezoar-twin", "recorded": "openbezoar-twin"}


def _rows(file: Path) -> list[dict[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of each scheme, and the filter on what Orca's wrote."""
    folder = tmp_path_factory.mktemp("openbezoar")
    found = {
        name: run(f"curate.{name}", to=folder / name, **TWIN, **knobs)
        for name, knobs in (("lamini", {"size": 8, "ask": 8}), ("evol", {"rounds": 1}), ("orca", {"messages": 2}))
    }
    for name in ("lamini", "orca"):
        data = str(found[name].to / "dataset.jsonl")
        found[f"filtered {name}"] = run("curate.judge_filter", to=folder / f"filtered-{name}", recorded=TWIN["recorded"], data=data)
    return found


def test_every_row_says_its_scheme_its_generator_and_its_source(done: dict[str, Any]) -> None:
    for name in ("lamini", "evol", "orca"):
        rows = _rows(done[name].to / "dataset.jsonl")
        assert rows and all(r["scheme"].startswith(name) and r["generator"] == "recorded in recorded.jsonl" for r in rows)
        assert all(0 <= r["source"] < 8 and r["text"] == template(r["system"], r["instruction"]) + r["response"] for r in rows)
        assert all([m["content"] for m in r["messages"]][-2:] == [r["instruction"], r["response"]] for r in rows)
        assert len(rows) == done[name].steps[0]["metrics"]["kept"]


def test_lamini_makes_new_instructions_alone(done: dict[str, Any]) -> None:
    rows = _rows(done["lamini"].to / "dataset.jsonl")
    seeds = {s.instruction for s in read_rows(Data("openbezoar-twin"))}
    made = [r["instruction"] for r in rows]
    assert len(set(made)) == len(made) == 6 and not set(made) & seeds
    assert done["lamini"].steps[0]["metrics"]["removed"]["repeats an instruction"] == 2
    assert all(len(r["seeds"]) == 3 for r in rows)


def test_topics_are_broad_and_short_and_guide_a_share(tmp_path: Path) -> None:
    table = [{"topic": t, "subcategories": n} for t, n in (("Music", 40), ("History of the world", 90), ("Tin", 3))]
    assert lamini.read_topics(Path(write_jsonl(tmp_path / "topics.jsonl", table))) == ["Music"]
    plain = tmp_path / "topics.txt"
    plain.write_text("History of the world\n\nTin\n")
    assert lamini.read_topics(plain) == ["History of the world", "Tin"]
    knobs = {"size": 8, "ask": 8, "topics": str(plain), "topic_share": 1.0}
    rows = _rows(run("curate.lamini", to=tmp_path / "out", **TWIN, **knobs).to / "dataset.jsonl")
    assert {r["scheme"] for r in rows} == {"lamini topics"}
    assert "Tin" in lamini.request(["a"], ["Tin"], 3) and "topic" not in lamini.request(["a"], [], 3)


def test_each_failed_evolution_has_its_reason_and_leaves_the_old_one(done: dict[str, Any]) -> None:
    metrics = done["evol"].steps[0]["metrics"]
    assert metrics["removed"] == {"words of the template leaked": 1, "no gain": 1} and metrics["pool"] == 8
    assert metrics["kept"] == 6 == sum(metrics["kept_by_operator"].values())


def test_a_gain_that_is_not_known_is_none(tmp_path: Path) -> None:
    rows = _rows(SAMPLE / "recorded.jsonl")
    unsure = [r | {"answer": "Hard to say."} if r["answer"] == "different" else r for r in rows]
    with pytest.raises(UserError, match="no row was kept, because 6 gain is not known"):
        run("curate.evol", to=tmp_path / "out", data=TWIN["data"], recorded=write_jsonl(tmp_path / "r.jsonl", unsure), rounds=1)


@pytest.mark.parametrize("operator", evol.OPERATORS)
def test_operators_ask_for_different_things(operator: str) -> None:
    others = {evol.rewrite("x", name) for name in evol.OPERATORS if name != operator}
    assert evol.rewrite("x", operator) not in others and "x" in evol.rewrite("x", operator)
    assert ("10 to 20 words" in evol.rewrite("x", operator)) == (operator != "breadth")


def test_faults_of_instructions_and_responses() -> None:
    assert instruction_fault("Sum it.", "sum it") == "instruction did not change" and instruction_fault("?!") == "empty instruction"
    assert instruction_fault("#Rewritten Prompt#: sum it twice", "sum it") == "words of the template leaked"
    assert instruction_fault("Write a prompt for a poem", "Write") == ""
    assert response_fault("The, and. It!") == "response of punctuation and stop words" == response_fault("...")
    assert response_fault("I am sorry, no.") == "response says sorry" and response_fault("sorry " + "word " * 80) == ""


def test_a_trace_keeps_its_gold_answer_and_its_system_message(done: dict[str, Any]) -> None:
    rows = _rows(done["orca"].to / "dataset.jsonl")
    assert all(r["system"] == orca.SYSTEM[r["message"] - 1] and r["gold"] for r in rows)
    assert len({(r["source"], r["message"]) for r in rows}) == len(rows) == 14
    assert len(orca.SYSTEM) == len(set(orca.SYSTEM)) == 16 and orca.SYSTEM[0] == ""


def test_a_part_of_flan_limits_the_messages() -> None:
    rng = Random(0)
    drawn = {n for _ in range(50) for n in orca.systems(Row("q", "", "", 0, {"collection": "CoT"}), "collection", 1, rng)}
    assert drawn == set(orca.PARTS["cot"])
    assert orca.systems(Row("q", "", "", 0), "collection", 16, rng) == list(range(16))
    with pytest.raises(UserError, match="row 1 has 'flan3'"):
        orca.systems(Row("q", "", "", 0, {"collection": "flan3"}), "collection", 1, rng)


def test_the_filter_keeps_a_clear_yes_alone(done: dict[str, Any]) -> None:
    kept, before = (_rows(done[name].to / "dataset.jsonl") for name in ("filtered lamini", "lamini"))
    assert done["filtered lamini"].steps[0]["metrics"]["removed"] == {"judged not good enough": 1, "verdict is not known": 1}
    added = {"verdict", "verdict_text", "judge"}
    assert all({k: v for k, v in row.items() if k not in added} in before for row in kept), "rows are as they were"
    assert {row["verdict"] for row in kept} == {"yes"} and len(kept) == len(before) - 2


def test_what_contradicts_the_gold_answer_is_rejected_without_asking(done: dict[str, Any]) -> None:
    metrics = done["filtered orca"].steps[0]["metrics"]
    assert metrics["removed"] == {"contradicts the gold answer": 2} and metrics["requests"]["requests"] == metrics["rows"] - 2


@pytest.mark.parametrize(
    ("response", "gold", "found"),
    [
        ("They are 12 in all.", "12", False),
        ("They are 13 in all.", "12", True),
        ("Many.", "12", False),
        ("1,200 dollars", "$1200", False),
        ("5 + 6 = 11", "5 + 6 = 11\n#### 12", True),
        ("Yes, it is.", "yes", False),
        ("No. It is not.", "yes", True),
        ("It is round.", "yes", False),
        ("The answer is (B).", "B", False),
        ("The answer is C", "(B)", True),
        ("Paris is the capital.", "Rome", False),
        ("anything", "", False),
    ],
)
def test_contradictions_are_those_of_numbers_letters_and_yes_or_no(response: str, gold: str, found: bool) -> None:
    assert judge_filter.contradicts(response, gold) is found


def _verdict(answer: Answer, **knobs: Any) -> str:
    return judge_filter.verdict_of(answer, judge_filter.Knobs(**knobs))


def test_verdicts_are_constrained() -> None:
    assert [_verdict(Answer(t)) for t in ("Yes.", " **no** ", "yes and no", "")] == ["yes", "no", "unknown", "unknown"]
    assert [_verdict(Answer(t), ask="score") for t in ("7", "11", "7/10", "seven")] == ["7", "unknown", "unknown", "unknown"]
    logits = [_verdict(Answer(probabilities=p), verdict="logits") for p in ((0.6, 0.4), (0.1, 0.9), (0.5, 0.5), None)]
    assert logits == ["yes", "no", "unknown", "unknown"] and _verdict(Answer(status="timeout")) == "failed"
    accepted = [v for v in ("yes", "no", "unknown", "failed", "6", "7", "10") if judge_filter.accepted(v, judge_filter.Knobs())]
    assert accepted == ["yes", "7", "10"]


def test_a_checkpoint_judges_by_the_probabilities_of_its_next_token(tmp_path: Path) -> None:
    try:
        found = run("curate.judge_filter", to=tmp_path / "out", data=TWIN["data"], generator="seedling", verdict="logits").steps[0][
            "metrics"
        ]
        assert found["kept"] == found["verdicts"]["yes"]
    except UserError as error:  # the seedling may say no to all
        assert "no row was kept" in str(error)


def test_replies_are_read_by_their_headings() -> None:
    assert numbered("Sure.\n### Instruction 1\na\n\nb\n## Instruction 2:\nc\n### Instruction 3\n", "Instruction") == ["a\n\nb", "c"]
    assert numbered("no heading", "Instruction") == []
    assert one_word("Equal!", ("equal",)) == "equal" and one_word("unequal", ("equal",)) == ""


def test_rows_are_read_from_the_usual_tables(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "context": "b", "response": "c"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
        {"question": "a", "output": "c"},
    ]
    found = read_rows(Data(write_jsonl(tmp_path / "rows.jsonl", rows)), response=True)
    assert [(r.system, r.instruction, r.response) for r in found] == [("", "a\n\nb", "c"), ("s", "a", "c"), ("", "a", "c")]


@pytest.mark.parametrize(
    ("name", "knobs", "sentence"),
    [
        ("lamini", {"data": None}, "no data was given"),
        ("lamini", {"recorded": None}, "no generator was given"),
        ("lamini", {"topics": "nowhere.txt"}, "no file at"),
        ("evol", {"operators": ["deeper"]}, "did you mean 'deepen'"),
        ("evol", {"operators": []}, "operators is empty"),
        ("orca", {"gold": "nowhere"}, "has no 'nowhere'"),
        ("judge_filter", {"ask": "score", "verdict": "logits"}, "does not fit ask=score"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(tmp_path: Path, name: str, knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(f"curate.{name}", to=tmp_path / "out", **(TWIN | knobs))
    assert not (tmp_path / "out").exists()


def test_bad_tables_and_records_are_one_sentence(tmp_path: Path) -> None:
    for row, sentence in (({"text": "x"}, "row 1 of .* has no instruction"), ({"instruction": "x"}, "row 1 of .* has no response")):
        with pytest.raises(UserError, match=sentence):
            run("curate.judge_filter", to=tmp_path / "out", recorded=TWIN["recorded"], data=write_jsonl(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(UserError, match="row 1 of .* is no recorded answer"):
        run("curate.orca", to=tmp_path / "out", data=TWIN["data"], recorded=write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}]))
    silent = write_jsonl(tmp_path / "silent.jsonl", [{"prompt": "?", "answer": "I am sorry."}])
    with pytest.raises(UserError, match="no row was kept, because 8 response says sorry"):
        run("curate.orca", to=tmp_path / "out", data=TWIN["data"], recorded=silent)
