"""Traces as text and as tokens: they come back as they were, and exactly the right tokens are learnt."""

from pathlib import Path
from typing import Any

import pytest

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reward.tools.encode import encode, traced_rows, traces_together, with_special
from modelwright.reward.tools.replay import comes_back, files_of, read_pairs
from modelwright.reward.tools.traces import (
    NO_TOOL,
    OBSERVATION,
    TOOL,
    WORK,
    Call,
    Judged,
    Part,
    Trace,
    TracedPair,
    asked_for,
    pairs_of,
    parse,
    parse_actions,
)

CALL = Call("Which day?", "Calendar.week_day", "2015-03-24", "Tuesday")
TWO = Trace((CALL, Call("Again\nwith a line.", "calculator", "", " spaces \n")), "", "It fits.")
NONE = Trace((), NO_TOOL, "No tool was used.")
ALL: dict[Part, float] = {"prompt": 0.0, "tool": 1.0, "observation": 0.5, "rationale": 2.0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = Checkpoint("seedling").tokenizer()
    assert with_special(found) == 3 and with_special(found) == 0
    return found


@pytest.mark.parametrize("trace", [TWO, NONE, Trace((CALL,), "\nThought: I am sure.", "Yes.\nReally.")], ids=["calls", "none", "closing"])
def test_a_trace_comes_back_from_both_its_texts(trace: Trace) -> None:
    assert comes_back(trace)
    assert parse_actions(trace.actions()).calls == trace.calls
    assert parse(trace.text()).calls == trace.calls and parse(trace.text()).rationale == trace.rationale


def test_every_recorded_trace_comes_back(shared: Path) -> None:
    sizes = {}
    for file in files_of(shared / "tara"):
        pairs = read_pairs(file)
        sizes[file.name.partition(".")[0]] = len(pairs)
        assert all(comes_back(j.trace) for p in pairs for j in (p.chosen, p.rejected)), file.name
    assert sizes == {
        "calculator_train": 877, "calculator_test": 154, "code_train": 486, "code_test": 189, "calendar_train": 320, "calendar_test": 106,
        "weather_train": 476, "weather_test": 158, "translator_test": 300, "webgpt_test": 134, "wikisearch_test": 284,
        "multi_tools_train": 432, "multi_tools_test": 144, "hh_rlhf_train": 500, "hh_rlhf_test": 120,
    }  # fmt: skip


def test_what_is_no_trace_says_so() -> None:
    with pytest.raises(ValueError, match="has no <start_work>"):
        parse("Thought: nothing")
    with pytest.raises(ValueError, match="no Thought, Action"):
        parse(f"{TOOL} what {OBSERVATION} Observation: x\n{WORK} Work: y")
    with pytest.raises(ValueError, match="row 1 is no traced pair"):
        pairs_of([{"question": "a"}])


def test_the_call_that_a_text_asks_for_is_its_last() -> None:
    text = (
        f"{TOOL} Thought: a\nAction: b\nAction Input: c\n{OBSERVATION} Observation: d\n{TOOL} Thought: e\nAction: f g\nAction Input: h, i\n"
    )
    assert asked_for(text) == ("f g", "h, i")
    assert asked_for(f"{TOOL} Thought: e\n") is None


@pytest.mark.parametrize("trace", [TWO, NONE], ids=["calls", "none"])
def test_each_token_is_learnt_as_its_part_of_the_trace(trace: Trace, tokenizer: Any) -> None:
    pair = TracedPair("Which day is 2015-03-24?", Judged("Tuesday", trace), Judged("Sunday", trace), "A calendar.")
    ids, weights = encode(tokenizer, pair, pair.chosen, ALL)
    said = tokenizer.convert_ids_to_tokens(ids)
    begin = said.index(TOOL)
    assert (
        tokenizer.decode(ids[:begin])
        == "### USER:\nContext: A calendar.\nQuestion: Which day is 2015-03-24?\nAnswer: Tuesday\n\n### ASSISTANT:\n"
    )
    assert tokenizer.decode(ids[begin:-1]) == trace.text() and ids[-1] == tokenizer.eos_token_id
    kind = 0.0
    for i, (token, weight) in enumerate(zip(said, weights, strict=True)):  # an observation begins behind its token and ends before the next
        kind = {TOOL: 1.0, WORK: 2.0}.get(token, 0.5 if i and said[i - 1] == OBSERVATION else kind)
        assert weight == kind, (i, token)


def test_a_good_answer_is_learnt_where_that_is_asked_for(tokenizer: Any) -> None:
    pair = TracedPair("Which day?", Judged("Tuesday", NONE), Judged("Sunday", NONE), "A calendar.")
    ids, weights = encode(tokenizer, pair, pair.chosen, ALL, learn_answer=True)
    begin = weights.index(1.0)
    assert tokenizer.decode(ids[:begin]).endswith("Question: Which day?\n")
    assert tokenizer.decode(ids[begin:]).startswith("Answer: Tuesday\n\n### ASSISTANT:\n<start_tool>") and 0.0 not in weights[begin:]


def test_rows_leave_out_what_does_not_fit_and_batches_hold_the_good_first(tokenizer: Any) -> None:
    good = TracedPair("Which day?", Judged("Tuesday", TWO), Judged("Sunday", NONE))
    same = TracedPair("Which day?", Judged("Tuesday", TWO), Judged("Tuesday", TWO))
    long = TracedPair("Which day? " * 200, Judged("Tuesday", TWO), Judged("Sunday", TWO))
    rows = traced_rows([good, same, long], tokenizer, 256, ALL, False)
    assert rows.facts == {"pairs": 1, "left out: both answers are equal": 1, "left out: longer than the context": 1}
    batch = traces_together([rows[0], {"example_id": -1}])
    assert batch["example_id"].tolist() == [0, -1, 0, -1] and batch["real"].sum(1).tolist()[1] == 0
    assert tokenizer.decode(batch["input_ids"][2][batch["real"][2]]).count("Sunday") == 1
    assert bool(((batch["labels"] != -100) == (batch["weights"] > 0)).all())
    with pytest.raises(UserError, match="1 are equal"):
        traced_rows([same], tokenizer, 256, ALL, False)
