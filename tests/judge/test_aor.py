"""AoR: the algorithm against a scorer that knows, one that does not, and the call count; its prompts and their parser."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import pytest

import modelwright
from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError
from modelwright.judge.aor import Knobs, run
from modelwright.judge.chains import letters
from modelwright.judge.chains.answers import Choice
from modelwright.judge.chains.critic import Critic, parse_scores, render
from modelwright.judge.chains.questions import Question, read_chains
from modelwright.judge.chains.scoring import Request, Scores
from modelwright.judge.select import select

TINY = Path(__file__).parent / "tiny"
KNOBS = Knobs(chains="")


def question(answers: str) -> Question:
    return Question("?", answers[0], [f"chain {i}: the answer is {a}" if a != "-" else "no idea" for i, a in enumerate(answers)])


class Table:
    """Scores by answer; keeps what it was asked."""

    def __init__(self, scores: dict[str, float], default: float = 0.0):
        self.scores, self.default, self.requests = scores, default, []

    def __call__(self, requests: list[Request]) -> list[Scores]:
        self.requests += requests
        return [[self.scores.get(c[-1], self.default) for c in r.chains] for r in requests]


def ask(answers: str, scorer: Any, **changes: Any) -> Choice:
    return run([question(answers)], scorer, replace(KNOBS, **changes))[0]


def test_a_scorer_that_knows_the_quality_finds_a_right_answer_in_the_minority() -> None:
    answers = "2" * 12 + "3" * 6 + "1" * 2
    assert select(question(answers).chains).answer == "2"
    assert ask(answers, Table({"1": 9, "2": 6, "3": 6})) == Choice("1", 20, 3 + 2 + 1 + 3, margin=pytest.approx(3))
    assert select(question(answers).chains, "aor", scorer=Table({"1": 9, "2": 6, "3": 6})).answer == "1"


def test_constant_scores_sample_all_and_take_the_answer_seen_first() -> None:
    found = ask("3" + "2" * 39, Table({}, 7), epsilon=0, k=40)
    assert (found.answer, found.chains, found.margin) == ("3", 40, 0)


def test_one_answer_needs_no_call() -> None:
    table = Table({})
    assert ask("4" * 25, table) == Choice("4", 20) and ask("4-4-4", table) == Choice("4", 5) and not table.requests


@pytest.mark.parametrize("answers", ["1" * 3 + "2" * 17, "1" * 11 + "2" * 6 + "3" * 3, "12345" * 4])
def test_calls_are_the_batches_of_each_answer_and_k_rounds(answers: str) -> None:
    table = Table({"1": 9}, 6)
    found = ask(answers, table)
    local = sum(ceil(answers.count(a) / 5) for a in set(answers))
    assert found.calls == local + 3 == len(table.requests) and sum(r.compare for r in table.requests) == 3
    assert {len(r.chains) for r in table.requests if r.compare} == {len(set(answers))}


def test_theta_0_never_samples_and_theta_above_10_always_goes_to_the_end() -> None:
    for answers in ("12" * 20, "1" + "2" * 39, "13" * 20):
        assert ask(answers, Table({"1": 9}, 7), theta=0).chains == 20
        assert ask(answers, Table({"1": 10}, 0), theta=10.5, epsilon=0).chains == 40


def test_sampling_stops_at_the_margin_and_scores_only_what_is_new() -> None:
    class Late(Table):
        def __call__(self, requests: list[Request]) -> list[Scores]:
            self.requests += requests
            return [[9.0 if "chain 27" in c else 7.0 if c[-1] == "2" else 6.0 for c in r.chains] for r in requests]

    late = Late({})
    found = ask("12" * 13 + "21" * 7, late, k=1)
    assert (found.answer, found.chains, found.margin) == ("1", 30, pytest.approx(2.0))
    shown = [c for r in late.requests if not r.compare for c in r.chains]
    assert len(shown) == len(set(shown)) == 30
    assert late.requests[-1].compare and all(len(r.examples) in (1, 2) for r in late.requests[6:] if not r.compare)


def test_unchanged_representatives_are_not_compared_again() -> None:
    table = Table({"1": 7, "2": 6})
    found = ask("12" * 20, table)  # margin 1: samples to the end, and no new chain is better than the first three
    assert found.chains == 40 and sum(r.compare for r in table.requests) == 3


def test_answers_stand_in_every_place_in_turn_unless_official() -> None:
    def orders(**changes: Any) -> list[str]:
        table = Table({}, 7)
        ask("123" * 7, table, theta=0, **changes)
        return ["".join(c[-1] for c in r.chains) for r in table.requests if r.compare]

    ours = orders()
    assert all({o[p] for o in ours} == set("123") for p in range(3)) and ours == orders()
    assert orders(compat="official") == ["123"] * 3


def test_questions_without_a_winner_are_counted_and_fall_back_on_the_vote() -> None:
    low = Table({}, 3)
    assert ask("112" * 14, low) == Choice("1", 40, low.requests.__len__(), "no chain passes epsilon")
    assert ask("112" * 14, Table({}, 3), fallback="none").answer == ""
    assert ask("112" * 14, Table({}, 3), compat="official").chains == 20, "the published code gives up at once"

    def silent(requests: list[Request]) -> list[Scores]:
        return [None if r.compare else [8.0] * len(r.chains) for r in requests]

    assert ask("112" * 14, silent).status == ask("112" * 14, silent, compat="official").status == "global scores did not parse"
    for compat in ("none", "official"):
        assert ask("112" * 14, lambda rs: [None for _ in rs], compat=compat).status == "local scores did not parse"


def test_a_chain_without_an_answer_stands_for_one_only_officially() -> None:
    table = Table({"1": 8}, 7)
    assert ask("1-2" * 7, table).answer == "1" and not any(c == "no idea" for r in table.requests for c in r.chains)
    official = Table({"1": 8}, 7)
    ask("1-2" * 7, official, compat="official")
    assert any(c == "no idea" for r in official.requests for c in r.chains)
    assert ask("-" * 20, table).status == "no chain has an answer"


def test_questions_side_by_side_are_the_questions_alone() -> None:
    asked = [question(a) for a in ("12" * 20, "1" * 40, "2221" * 10, "123")]
    together = run(asked, Table({"1": 8}, 7), KNOBS)
    assert together == [run([q], Table({"1": 8}, 7), KNOBS)[0] for q in asked]


def published(answers: list[str], score: Any, k: int = 3, theta: float = 2, eps: float = 6) -> tuple[str, int, int]:
    """The published procedure, step by step, where every reply parses: answer, chains, requests."""
    calls, n = 0, 20

    def local(numbers: range) -> dict[str, list[tuple[float, int]]]:
        nonlocal calls
        top = {}
        for a in dict.fromkeys(answers[i] for i in numbers):
            mine = [i for i in numbers if answers[i] == a]
            calls += ceil(len(mine) / 5)
            if good := sorted(((score("local", i), i) for i in mine if score("local", i) >= eps), key=lambda s: s[0], reverse=True)[:k]:
                top[a] = good
        return top

    def compare() -> tuple[str, float]:
        nonlocal calls
        calls += k
        mean = {a: sum(score("global", r[t % len(r)][1]) for t in range(k)) / k for a, r in kept.items()}
        ranked = sorted(mean.values(), reverse=True)
        return max(mean, key=mean.__getitem__), ranked[0] - (ranked[1] if len(ranked) > 1 else 0)

    if len(set(answers[:n])) == 1:
        return answers[0], n, 0
    kept = local(range(n))
    if not kept:
        return "", n, calls
    final, margin = compare()
    while margin < theta and n < 40:
        new, n = local(range(n, n + 5)), n + 5
        merged = {a: sorted(kept.get(a, []) + r, key=lambda s: s[0], reverse=True)[:k] for a, r in new.items()}
        if any(kept.get(a) != r for a, r in merged.items()):
            kept |= merged
            final, margin = compare()
    return final, n, calls


def test_official_is_the_published_procedure_step_by_step() -> None:
    seen = set()
    for case in range(200):
        rng = Random(case)
        answers = [rng.choice("1223334444"[: rng.randint(2, 10)]) for _ in range(40)]
        marks = {(kind, i): float(rng.randint(rng.choice((0, 4)), 10)) for kind in ("local", "global") for i in range(40)}
        q = Question("?", "", [f"#{chr(65 + i)} the answer is {a}" for i, a in enumerate(answers)])

        def scorer(requests: list[Request], marks: Any = marks) -> list[Scores]:
            return [[marks["global" if r.compare else "local", ord(c[1]) - 65] for c in r.chains] for r in requests]

        found = run([q], scorer, replace(KNOBS, compat="official", fallback="none"))[0]
        answer, n, calls = published(answers, lambda kind, i, marks=marks: marks[kind, i])
        assert (found.answer, found.chains, found.calls) == (answer, n, calls)
        seen.add(n)
    assert seen == {20, 25, 30, 35, 40}


def test_scores_are_read_strictly() -> None:
    text = "Chain 2 is weak.\nChain 1: 8/10\n**Chain 2** Total Score: 6.5/10"
    assert parse_scores(text, 2) == [8, 6.5] and parse_scores("Option 1: 3/10\nOption 1: 4/10", 1) == [4]
    assert [parse_scores(t, n) for t, n in ((text, 1), (text, 3), ("Chain 1: 11/10", 1), ("Chain 1: 8", 1), ("", 1))] == [None] * 5


class Says:
    """A judge that gives out its replies one after the other."""

    name = "says"

    def __init__(self, *replies: str):
        self.replies, self.prompts = list(replies), []

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, p in enumerate(prompts):
            self.prompts.append(p)
            yield i, Answer(self.replies.pop(0))


def test_a_reply_that_does_not_parse_is_asked_for_again_and_counted() -> None:
    request = Request("?", ("a", "b"))
    critic = Critic(Desk(judge := Says("hm", "Chain 1: 5/10", "Chain 1: 5/10\nChain 2: 6/10")))
    assert critic([request]) == [[5, 6]] and critic.unread == 2 and [p.attempt for p in judge.prompts] == [0, 1, 2]
    assert Critic(Desk(Says(*["hm"] * 5)), retries=5)([request]) == [None]
    assert Critic(Desk(Says("hm")), temperature=0)([request]) == [None], "the same reply would come again"


def test_prompts_show_the_chains_and_the_examples() -> None:
    local = render(Request("Q?", ("first", "second"), examples=(("good", 9.0), ("bad", 6.0)))).messages[1][1]
    assert local.index("good") < local.index("bad") < local.index("Chain 1:\nfirst") < local.index("Chain 2:\nsecond") and "9/10" in local
    assert "Option 2:\nsecond" in render(Request("Q?", ("first", "second"), compare=True)).messages[1][1]


def test_every_step_of_the_letters_is_checked() -> None:
    q = 'Take the last letters of each words in "Ada Bob" and concatenate them.'
    right = "The last letter of 'Ada' is 'a'. The last letter of 'Bob' is 'b'. Concatenating them is 'ab'. The answer is ab."
    assert letters.score(q, right) == 10 and letters.score(q, "A: The last letters are 'a' and 'b'. The answer is ab.") == 10
    assert letters.score(q, right.replace("'b'. Con", "'o'. Con")) == 6 and letters.score(q, right.replace("is ab.", "is ba.")) == 7
    assert letters.score(q, "The last letter of 'Ada' is 'a'. The answer is a.") == 8.5 and letters.score(q, "The answer is ab.") == 2


def test_a_verifier_lifts_aor_above_the_vote_with_fewer_chains(shared: Path) -> None:
    file = shared / "selfconsistency" / "esc_gpt35_last_letters.jsonl.gz"
    metrics = modelwright.run("judge.aor", chains=file, kind="letters", verifier="letters").plain()["metrics"]
    assert metrics["self-consistency"]["accuracy"] == 83 and metrics["self-consistency"]["chains"] == 40
    assert metrics["aor"]["accuracy"] > 90 and metrics["aor"]["chains"] < 22 and metrics["p_against_self_consistency"] < 1e-6
    assert sum(metrics["outcomes"].values()) == 500


@pytest.mark.parametrize("base", ["seedling"])
def test_a_real_checkpoint_scores_chains_and_what_it_cannot_is_counted(base: str, tmp_path: Path) -> None:
    knobs = {"chains": TINY / "chains.jsonl", "kind": "letters", "retries": 2, "group": 1, "limit": 1}
    metrics = modelwright.run("judge.aor", base=base, to=tmp_path / "out", **knobs).plain()["metrics"]
    counts = metrics["requests"]
    assert counts["requests"] > 0 and metrics["outcomes"] == {"local scores did not parse": 1} and metrics["aor"]["no_answer"] == 0
    assert counts["unread_replies"] + sum(counts["failed"].values()) == counts["requests"]


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({}, "no judge was given; give a checkpoint with --base"),
        ({"verifier": "letters", "n": 50}, "max=40 is less than n=50"),
        ({"verifier": "letter"}, "verifier='letter' is not a choice; did you mean 'letters'?"),
        ({"verifier": "letters", "kind": "yes_no"}, "holds no yes or no; check kind"),
    ],
)
def test_bad_input_is_one_sentence(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        modelwright.run("judge.aor", **{"chains": TINY / "chains.jsonl", "kind": "letters", **knobs})
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_chains_beyond_the_recorded_ones_are_not_wanted() -> None:
    asked = read_chains(TINY / "chains.jsonl", "letters", {})
    assert [c.chains for c in run(asked, Table({}, 7), KNOBS)] == [4, 4, 4]
