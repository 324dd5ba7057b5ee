"""Answers and votes: extraction, one select() for every way, published numbers on recorded chains, bad input."""

import gzip
import json
from fractions import Fraction
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.judge.ask.records import records
from modelwright.judge.chains.answers import extract, same
from modelwright.judge.chains.votes import majority_probability, vote
from modelwright.judge.select import METHODS, select

TINY = Path(__file__).parent / "tiny"


def chains(answers: str) -> list[str]:
    return [f"So the answer is {a}." if a != "-" else "I do not know." for a in answers]


def test_extraction_reproduces_what_was_judged_correct_on_gsm8k(shared: Path) -> None:
    rows = records(shared / "gsm8k" / "example_model_solutions.jsonl.gz")
    right = {}
    for system in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        marks = [same(extract(r[system]["solution"], "number"), extract(r["ground_truth"], "number"), "number") for r in rows]
        assert marks == [r[system]["is_correct"] for r in rows]
        right[system] = sum(marks)
    assert list(right.values()) == [286, 515, 458, 742] and len(rows) == 1319


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("3 and 4, so the answer is $1,234.50.", "number", "1234.5"),
        ("The Answer Is 18.00", "number", "18"),
        ("#### -7", "number", "-7"),
        ("The answer is .5", "number", "0.5"),
        ("The answer is $.50.", "number", "0.5"),
        ("The answer is -.5", "number", "-0.5"),
        ("so they ate apples.5", "number", "5"),
        ("The answer is \u22125", "number", "-5"),
        ("The answer is -$5", "number", "-5"),
        ("The answer is $-5", "number", "-5"),
        ("The answer is - 5", "number", "-5"),
        ("The answer is x = - 5", "number", "-5"),
        ("The answer is 10 - 5", "number", "5"),
        ("The answer is 2-3 days", "number", "3"),
        ("The answer is 1/2", "number", "0.5"),
        ("The answer is -1/2", "number", "-0.5"),
        ("The answer is 58/2.", "number", "29"),
        ("The answer is 1 1/2 cups", "number", "1.5"),
        ("The answer is 1½", "number", "1.5"),
        ("The answer is $\\frac{58}{2}$", "number", "29"),
        ("The answer is 2.9e1", "number", "29"),
        ("The answer is 2.9 × 10^1", "number", "29"),
        ("The answer is $2.9 \\times 10^{1}$", "number", "29"),
        ("The answer is 10⁶", "number", "1000000"),
        ("The answer is 25 m²", "number", "25"),
        ("The answer is $5/hour", "number", "5"),
        ("The answer is \\boxed{42}", "number", "42"),
        ("\\sqrt{16} = 4", "number", "4"),
        ("The answer is 12:00", "number", ""),
        ("The answer is ±2021", "number", ""),
        ("The answer is 1/e", "number", ""),
        ("The answer is 2π", "number", ""),
        ("The answer is $\\sqrt{2}$", "number", ""),
        ("The answer is 1/0", "number", ""),
        ("The answer is 1e999999999", "number", ""),
        ("The answer is 1e400", "number", "1E+400"),
        ("= 20 + 0\nA: 100", "number", "100"),
        ("nothing", "number", ""),
        ("The answer is (b) because it adds up.", "choice", "B"),
        ("Not A. The answer is C", "choice", "C"),
        ("the answer is a dog", "choice", ""),
        ("No, wait. So the answer is Yes.", "yes_no", "yes"),
        ("the answer is not known", "yes_no", ""),
        ("The answer is 'Y-a-j o'.", "letters", "yajo"),
        ("the answer is Paris.", "text", "Paris"),
    ],
)
def test_final_answers_are_read(text: str, kind: Any, answer: str) -> None:
    assert extract(text, kind) == answer


def test_published_choice_rule_reads_letters_within_words() -> None:
    assert (
        extract("The answer is (B) because it fits", "choice", official=True)
        == "E"
        != extract("The answer is (B) because it fits", "choice")
    )


def test_numbers_are_the_same_within_a_hundred_thousandth_and_no_answer_is_like_none() -> None:
    assert same("100000", "100000.9", "number") and not same("100000", "100002", "number")
    assert not same("", "", "text") and not same("", "3", "number")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("$1-\\frac{1}{\\mathrm{e}}$", "$1+\\frac{1}{\\mathrm{e}}$"),
        ("1/2^99", "1/2^98"),
        ("1/2004!", "1/2006!"),
        ("n=2,3,4", "n=1,2,3"),
        ("12:00", "1:00"),
        ("±2021", "2021"),
        ("1e400", "2e400"),
        ("1e-400", "2e-400"),
        ("9" * 5000, "8" * 5000),
    ],
)
def test_different_answers_are_not_the_same(a: str, b: str) -> None:
    """A formula that is not understood has no number, and no tolerance is absolute (huggingface/Math-Verify#82, #14)."""
    assert not same(extract(a, "number"), extract(b, "number"), "number")


@pytest.mark.parametrize(
    ("gold", "answers"),
    [(0.5, [".5", "$.50", "1/2"]), (-5, ["\u22125", "-$5", "- 5"]), (29, ["58/2", "2.9e1", "2.9 x 10^1"])],
)
def test_answers_that_equal_the_gold_are_right_however_they_are_written(gold: float, answers: list[str], tmp_path: Path) -> None:
    row = {"question": "?", "answer": gold, "chains": [f"So the answer is {a}." for a in answers]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    found = modelwright.run("judge.select", chains=tmp_path / "c.jsonl", methods=["self_consistency"]).plain()["metrics"]
    assert [select([c], kind="number").answer for c in row["chains"]] == [str(gold)] * 3
    assert found["methods"]["self_consistency"]["accuracy"] == 100


def test_published_numbers_are_read_as_published() -> None:
    assert [extract(f"the answer is {t}", "number", official=True) for t in (".5", "-$5", "1/2", "-7.0")] == ["5", "5", "2", "-7"]


def test_the_first_seen_wins_a_tie_and_empty_answers_do_not_vote() -> None:
    assert vote(["", "", "b", "a", "a", "b"]) == "b" and vote(["", ""]) == "" and vote([]) == ""


def test_each_way_chooses_as_it_promises() -> None:
    c = chains("11222-----")
    assert select(c, n=2).answer == "1" and select(c).answer == "2" and select(c).chains == 10
    long = chains("111") + ["first\nsecond\nthe answer is 5", "one\n\ntwo\nthe answer is 5"]
    assert select(long, "complexity", top=2).answer == "5" and select(long, "complexity", top=5).answer == "1"
    assert select(c, "best_of_n", scores=[0, 0, 0, 5, 1, 9, 0, 0, 0, 0], n=5).answer == "2"
    stopped = select(chains("1231111199"), "esc", window=3)
    assert (stopped.answer, stopped.chains) == ("1", 6)
    assert select(chains("1212"), "esc", window=3).chains == 4
    assert select(chains("1" * 20), "adaptive").chains == 4 and select(chains("12" * 10), "adaptive").chains == 20


def test_only_the_chains_that_are_needed_are_sampled() -> None:
    class Lazy(list):
        looked: set[int] = set()

        def __getitem__(self, i: Any) -> Any:
            self.looked.add(i)
            return super().__getitem__(i)

    for method in ("esc", "adaptive"):
        lazy = Lazy(chains("1" * 40))
        lazy.looked = set()
        used = select(lazy, method).chains
        assert lazy.looked == set(range(used)) and used < 6


def test_majority_probability_is_the_beta_tail() -> None:
    for a, b in ((0, 0), (4, 0), (5, 1), (3, 3), (7, 2)):
        p = np.linspace(0.5, 1, 200001)
        density = p**a * (1 - p) ** b
        area = (density[1:] + density[:-1]).sum() / 2 * (p[1] - p[0])
        norm = Fraction(factorial(a) * factorial(b), factorial(a + b + 1))
        assert majority_probability(a, b) == pytest.approx(area / float(norm), abs=1e-6)


def test_published_numbers_come_out_on_recorded_chains(shared: Path) -> None:
    metrics = modelwright.run(
        "judge.select", chains=shared / "selfconsistency" / "esc_gpt35_last_letters.jsonl.gz", kind="letters"
    ).plain()["metrics"]
    curve = {n: round(a, 1) for n, a in metrics["curves"]["self_consistency"]}
    assert [curve[n] for n in (1, 5, 10, 20, 40)] == [80.8, 82.6, 82.8, 83.0, 83.0]
    esc = metrics["methods"]["esc"]
    assert (round(esc["accuracy"], 1), round(esc["chains"], 2), round(metrics["coverage"], 1)) == (83.0, 8.56, 92.8)


def test_one_recorded_chain_a_question_is_enough(shared: Path) -> None:
    file = shared / "selfconsistency" / "esc_gpt4_coin_flip.jsonl.gz"
    metrics = modelwright.run("judge.select", chains=file, kind="yes_no", columns={"chains": "generated_answer"}).plain()["metrics"]
    assert metrics["questions"] == 93 and {round(m["accuracy"], 6) for m in metrics["methods"].values()} == {round(metrics["coverage"], 6)}


def test_scores_choose_where_they_are_given() -> None:
    metrics = modelwright.run(
        "judge.select", chains=TINY / "chains.jsonl", kind="letters", methods=["self_consistency", "best_of_n"]
    ).plain()["metrics"]
    assert metrics["methods"]["self_consistency"]["accuracy"] < metrics["methods"]["best_of_n"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("row", "knobs", "sentence"),
    [
        ({}, {"methods": ["esk"]}, "unknown method 'esk'; did you mean 'esc'?"),
        ({}, {"methods": ["aor"]}, "aor asks a judge; run judge.aor"),
        ({}, {"columns": {"chain": "x"}}, "unknown key 'columns.chain'; did you mean 'chains'?"),
        ({}, {"columns": {"chains": "chain"}}, "has no 'chain', because the chains of a question is read there; did you mean 'chains'?"),
        ({"answer": None}, {}, "has no 'answer'"),
        ({"chains": []}, {}, "has no chains in 'chains', because a list of texts is needed"),
        ({"chains": ["the answer is 3"], "scores": [1, 2]}, {"methods": ["best_of_n"]}, "has 2 scores for 1 chains"),
        ({"scores": [float("nan")]}, {"methods": ["best_of_n"]}, "a finite number is needed"),
        ({"scores": [10**400]}, {"methods": ["best_of_n"]}, "a finite number is needed"),
        ({"scores": "7"}, {"methods": ["best_of_n"]}, "has no list of scores in 'scores', because it holds '7'"),
        ({"scores": 7}, {"methods": ["best_of_n"]}, "has no list of scores"),
        (None, {}, "is empty"),
    ],
)
def test_bad_input_is_one_sentence(row: Any, knobs: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    whole = {"question": "1 + 2?", "answer": "3", "chains": ["the answer is 3"]}
    (tmp_path / "c.jsonl").write_text(
        "" if row is None else json.dumps({k: v for k, v in (whole | row).items() if v is not None or k == "answer"})
    )
    with pytest.raises(UserError) as error:
        modelwright.run("judge.select", chains=tmp_path / "c.jsonl", **knobs)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unknown_method_and_missing_scorer_are_refused() -> None:
    assert set(METHODS) == {"self_consistency", "complexity", "esc", "adaptive", "best_of_n", "aor"}
    for method, sentence in (("vote", "unknown method"), ("aor", "needs a scorer"), ("best_of_n", "needs a score for each chain")):
        with pytest.raises(UserError, match=sentence):
            select(["1"], method)


def test_gzipped_rows_are_read_and_damage_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert records(file, ("a",)) == [{"a": 1}, {"a": 2}]
    for content, sentence in (
        (gzip.compress(b""), "holds no text"),
        (gzip.compress(b'{"a": 1}\n' * 99)[:-9], "does not parse"),
        (gzip.compress(b"[1]\n"), "is no object|does not parse as a table"),
        (gzip.compress(b"\xff"), "does not parse"),
        (b"plain", "does not parse"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            records(file)
    with pytest.raises(UserError, match="no file at"):
        records(tmp_path / "gone.jsonl.gz")
