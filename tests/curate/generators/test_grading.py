"""Graders and checks: every recorded verdict again, no answer wrong because it was read badly, wrong samples out."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelwright.curate.generators import fuzzy
from modelwright.curate.generators.grade import grade, grade_choice, grade_number, kind_of, readings
from modelwright.curate.generators.tasks import Sample
from modelwright.curate.generators.verify import equations, value, wrong_with

SHARED = Path(os.environ.get("MODELWRIGHT_DATA", Path(__file__).parents[4] / "shared" / "data"))
RECORDS = SHARED / "llms_as_instructors"
needs_records = pytest.mark.skipif(not RECORDS.is_dir(), reason=f"{RECORDS} is absent")
OPTIONS = ["gold", "silver", "iron", "tin"]
BLOCK = "block with the prompt's imports"
TASK = {
    "prompt": 'import math\n\n\ndef root(n: int) -> float:\n    """The square root of n."""\n',
    "test": "def check(candidate):\n    assert candidate(9) == 3\n",
    "entry_point": "root",
}


def _records(name: str) -> list[dict[str, Any]]:
    with open(RECORDS / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_records
@pytest.mark.parametrize("official", [True, False])
def test_every_recorded_verdict_on_choices_comes_out_again(official: bool) -> None:
    for verdict, count in (("right", 1092), ("wrong", 724)):
        rows = _records(f"result_mmlu_mistral_Train_raw_{verdict}.jsonl")
        assert [grade("choice", r, r["response"], official).right for r in rows] == [verdict == "right"] * count


@needs_records
def test_two_patterns_alone_would_misread_choices() -> None:
    """1,070 of 1,092 and 14 of 724 are the counts of a grader that reads 'answer is X' and 'X is correct' alone, or nearly so."""
    rows = _records("result_mmlu_mistral_Train_raw_right.jsonl")
    how = [grade("choice", r, r["response"]).how for r in rows]
    assert how.count("pattern 1") == 627 and how.count("pattern 4") == 445 and how.count("pattern 2") == 7


@needs_records
def test_every_recorded_number_is_right_again() -> None:
    rows = _records("result_gsm8k_mistral_Train_raw_right.jsonl")
    assert sum(grade("number", r, r["response"], official=True).right for r in rows) == len(rows) == 3170


@needs_records
def test_false_errors_are_found_on_some_recorded_programs() -> None:
    """The whole set takes minutes: `curate instructors --regrade` and bench/instructors.py run it."""
    wrong = {r["entry_point"]: r for r in _records("result_mbpp_mistral_Train_raw_wrong.jsonl")}
    for name, how in (("sqrt_root", "block"), ("increment_numerics", BLOCK), ("find_Min_Sum", "AssertionError")):
        row = wrong[name]
        assert not grade("code", row, row["response"], official=True).right
        assert grade("code", row, row["response"]).how == how


def test_a_whole_block_passes_where_the_published_cut_loses_its_import() -> None:
    said = "Here:\n```python\nfrom math import sqrt\n\ndef root(n):\n    return sqrt(n)\n```"
    assert grade("code", TASK, said, official=True).how == "NameError"
    assert grade("code", TASK, said).how == "block" and grade("code", TASK, said).right
    assert [how for how, _ in readings(TASK, said, official=True)] == ["completion"]


def test_the_prompts_imports_and_examples_that_print_are_no_error() -> None:
    assert grade("code", TASK, "```python\nONE = 1\n\ndef root(n):\n    return ONE * math.sqrt(n)\n```").how == BLOCK
    failing = "```python\nimport math\ndef root(n):\n    return math.sqrt(n)\nassert root(4) == 3\n```"
    assert grade("code", TASK, failing).right
    assert not grade("code", TASK, "```python\ndef root(n):\n    return n\n```").right
    assert grade("code", TASK, "I cannot.").how == "no code"


def test_a_program_that_leaves_early_is_not_right() -> None:
    assert not grade("code", TASK, "```python\ndef root(n):\n    raise SystemExit(0)\n```").right


def test_numbers_are_read_in_two_ways() -> None:
    assert grade_number("#### 1,200", "It is 1200.00 dollars").right
    said = "The answer is 18. She has 5 hens."
    assert grade_number("18", said).how == "marked answer" and not grade_number("18", said, official=True).right
    assert grade_number("18", "no idea").how == "no number"


def test_choices_are_read_by_pattern_then_by_words_then_by_nearness() -> None:
    assert grade_choice("B", OPTIONS, "The answer is B. silver").how == "pattern 1"
    assert grade_choice("B", OPTIONS, "It must be silver, as every child knows").how == "option's words"
    assert grade_choice("B", OPTIONS, "It must be silvery stuff").how == "nearest option"
    assert grade_choice("B", OPTIONS, "A isn't right, but B is right").how == "pattern 2"


def test_nearest_text_is_the_first_of_equals() -> None:
    assert fuzzy.nearest("nothing alike", ["zzz", "zzz"]) == 0
    assert fuzzy.ratio("abc", "abc") == 100 and fuzzy.partial("b", "abc") == 100 and fuzzy.weighted("", "a") == 0


def test_kinds_are_told_by_their_columns() -> None:
    assert kind_of(TASK) == "code" and kind_of({"question": "?", "answer": "1"}) == "number" and kind_of({"text": "x"}) is None
    assert kind_of(dict.fromkeys("ABCD", "x") | {"question": "?", "answer": "A"}) == "choice"


def test_arithmetic_is_computed_exactly() -> None:
    assert value("1/3 + 2/3") == 1 and value("2 ** 99") is None and value("1/0") is None and value("__import__('os')") is None
    assert equations("so 3 x 4 = 12, and $5 + $6 = $11") == [("3*4", "12"), ("5 + 6", "11")]
    assert equations("18 * 50% = <<18*50*.01=9>>9 more") == [("18*50*.01", "9")]
    assert equations("x + 4 = 7, 100/5 = 5A/5") == []


def _number(calculation: str, final: str) -> str:
    return wrong_with("number", Sample("?", f"{calculation}\n#### {final}"))


def test_a_wrong_calculation_or_an_answer_from_nowhere_is_not_kept() -> None:
    assert _number("3 * 4 = 12\n12 + 5 = 17", "17") == ""
    assert _number("3 * 4 = 13\n13 + 5 = 18", "18") == "wrong calculation"
    assert _number("3 * 4 = 12", "13") == "final number is not computed"
    assert _number("It is clear.", "13") == "no calculation to check"
    assert _number("10 / 3 = 3.33", "3.33") == "" and _number("10 / 3 = 3.36", "3.36") == "wrong calculation"


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="gsm8k is absent")
def test_most_true_solutions_pass_and_changed_ones_do_not() -> None:
    with gzip.open(SHARED / "gsm8k" / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(1000), strict=False)]
    kept = [r for r in rows if not wrong_with("number", Sample(r["question"], r["answer"]))]
    assert len(kept) > 930
    changed = [r["answer"].rpartition("#### ")[0] + "#### 987654" for r in kept]
    assert not any(wrong_with("number", Sample("?", a)) == "" for a in changed)


def test_code_is_kept_where_its_own_tests_call_it_and_pass() -> None:
    answer = "```python\ndef double(x):\n    return 2 * x\n```"
    assert wrong_with("code", Sample("?", answer, "assert double(2) == 4")) == ""
    assert wrong_with("code", Sample("?", answer, "assert double(2) == 5")) == "tests fail (AssertionError)"
    assert wrong_with("code", Sample("?", answer, "assert True")) == "tests do not call the function"


def test_choices_must_differ_and_agree_with_themselves() -> None:
    question = "Which?\n" + "\n".join(f"{c}. {t}" for c, t in zip("ABCD", OPTIONS, strict=True))
    assert wrong_with("choice", Sample(question, "B. silver shines. The answer is B.")) == ""
    assert wrong_with("choice", Sample(question, "B. silver shines. The answer is C.")) == "answer contradicts itself"
    assert wrong_with("choice", Sample(question.replace("tin", "Gold"), "B. x")) == "options are alike"
