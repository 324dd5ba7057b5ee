"""LLMBar: published runs to the last digit, every strategy on stub judges, a real checkpoint, bad input."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelwright
from modelwright.core.ask.desk import Desk
from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError
from modelwright.judge.ask.prompts import STRATEGIES
from modelwright.judge.ask.verdict import measure, swap_names
from modelwright.judge.llmbar import ask

TINY = Path(__file__).parent / "tiny"
GPT4 = """vanilla 93.5/97.0 73.1/89.0 77.2/90.6
rules 95.5/95.0 80.8/91.0 83.7/91.8
cot 94.5/91.0 76.6/87.6 80.2/88.3
swap 94.5/97.0 80.1/96.0 83.0/96.2
swap_cot 94.0/100.0 80.3/96.8 83.0/97.5
metrics 93.0/94.0 82.0/88.3 84.2/89.5
reference 95.5/97.0 82.6/88.0 85.2/89.8
metrics_reference 96.0/96.0 82.8/88.2 85.4/89.8"""


@pytest.fixture(scope="module")
def replayed(shared: Path) -> dict[str, Any]:
    return modelwright.run("judge.llmbar", replay=shared / "llmbar").plain()["metrics"]


def test_every_recorded_run_text_and_rating_is_reproduced(replayed: dict[str, Any]) -> None:
    seen = replayed["reproduced"]
    assert [seen[k] for k in ("runs", "same winners", "same accuracy", "same agreement")] == [428] * 4
    assert (seen["completions"], seen["same completions"]) == (45658, 45658)
    assert (seen["ratings"], seen["same ratings"]) == (2933, 2933)


def test_a_run_is_read_by_the_pattern_of_its_own_judge(tmp_path: Path) -> None:
    """PaLM2's CoT is read by the pattern for direct verdicts: what opens a line counts, (a) before (b)."""
    (tmp_path / "datasets.json").write_bytes((TINY / "datasets.json").read_bytes())
    subset, labels = "LLMBar/Natural", [r["label"] for r in json.loads((TINY / "datasets.json").read_text())["LLMBar/Natural"]]
    text = "Output (b) is better.\n\nOutput (a) says more than it was asked for."
    step = {f"swap = {swap}": {"completion": [text, ""], "winner": winner} for swap, winner in ((False, "1"), (True, "2"))}
    rows = []
    for judge, form, winner in (("PaLM2", None, "12"), ("GPT-4", None, "21"), ("Other", "direct", "12")):
        verdicts = np.array([[int(w)] * len(labels) for w in winner])
        score = measure(verdicts, np.array(labels))
        name = {"evaluator": judge, "strategy": "CoT", "subset": subset}
        winners = {"winner_noswap": winner[0] * len(labels), "winner_swap": winner[1] * len(labels)}
        rows.append((name | winners | {"acc": score["accuracy"], "agreement": score["agreement"]}, name, form))
    (tmp_path / "evaluator_winners.jsonl").write_text("\n".join(json.dumps(r) for r, _, _ in rows))
    completions = [name | {"results": [[step]] * len(labels)} | ({"form": form} if form else {}) for _, name, form in rows]
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, completions)))
    seen = modelwright.run("judge.llmbar", replay=tmp_path).plain()["metrics"]["reproduced"]
    assert (seen["runs"], seen["same winners"], seen["same accuracy"]) == (3, 3, 3)


def test_averages_of_the_paper_come_out(replayed: dict[str, Any]) -> None:
    rows = {(r["evaluator"], r["strategy"]): r for r in replayed["averages"]}

    def line(s: str) -> str:
        parts = [rows["GPT-4", s][p] for p in ("natural", "adversarial", "overall")]
        return " ".join([s, *(f"{p['accuracy']:.1f}/{p['agreement']:.1f}" for p in parts)])

    assert [line(x.split()[0]) for x in GPT4.splitlines()] == GPT4.splitlines()
    others = {
        e: [f"{rows[e, s]['overall']['accuracy']:.1f}" for s in ("vanilla", "metrics_reference")] for e in ("ChatGPT", "LLaMA2", "Falcon")
    }
    assert others == {"ChatGPT": ["41.4", "47.6"], "LLaMA2": ["41.4", "49.9"], "Falcon": ["53.3", "53.6"]}


def test_a_recorded_figure_that_is_wrong_is_seen(tmp_path: Path) -> None:
    lines = (TINY / "evaluator_winners.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"acc": 51.0}
    (tmp_path / "evaluator_winners.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]))
    (tmp_path / "datasets.json").write_bytes((TINY / "datasets.json").read_bytes())
    result = modelwright.run("judge.llmbar", replay=tmp_path)
    assert result.plain()["metrics"]["reproduced"]["same accuracy"] == 9 and "9 of 10" in result.steps[0]["text"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"winner_swap": "12"}, "is damaged, because ValueError"),
        ({"winner_swap": "1", "winner_noswap": "1"}, "has 1 verdicts, because its subset has 3 pairs"),
        ({"acc": "high"}, "is damaged"),
        ({"acc": True}, "is damaged, because ValueError: 'True' is no percentage"),
        ({"acc": "50.0"}, "is damaged, because ValueError: '50.0' is no percentage"),
        ({"acc": 10**400}, "is damaged, because ValueError"),
        ({"agreement": float("nan")}, "is damaged, because ValueError: 'nan' is no percentage"),
        ({"winner_swap": "1x2"}, "is damaged, because ValueError: '1x2' holds something beside 1, 2 and -"),
        ({"scores": [1, 2, 3]}, "is damaged"),
        ({"strategy": "Vibes"}, "its strategy or its subset is not known"),
        ({"subset": "LLMBar/Wild"}, "its strategy or its subset is not known"),
        ({"acc": None}, "has no 'acc'"),
    ],
)
def test_a_damaged_record_is_one_sentence(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    row = json.loads((TINY / "evaluator_winners.jsonl").read_text().splitlines()[0]) | change
    (tmp_path / "evaluator_winners.jsonl").write_text(json.dumps(row))
    (tmp_path / "datasets.json").write_bytes((TINY / "datasets.json").read_bytes())
    with pytest.raises(UserError) as error:
        modelwright.run("judge.llmbar", replay=tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_run_or_a_pair_that_stands_twice_is_refused(tmp_path: Path) -> None:
    lines = (TINY / "evaluator_winners.jsonl").read_text().splitlines()
    (tmp_path / "evaluator_winners.jsonl").write_text("\n".join([*lines, lines[0]]))
    (tmp_path / "datasets.json").write_bytes((TINY / "datasets.json").read_bytes())
    with pytest.raises(UserError, match="row 11 of .* has the run .* again, because a run that stands twice would count twice"):
        modelwright.run("judge.llmbar", replay=tmp_path)
    pair = {"input": "x", "output_1": "y", "output_2": "z", "label": 1}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [pair, pair | {"input": "w"}, pair])))
    with pytest.raises(UserError, match="row 3 of pairs in .* is row 1 again"):
        modelwright.run("judge.llmbar", base="seedling", pairs=tmp_path / "pairs.jsonl")


class Stub:
    """Sees a quality q=N in each output; for two that are close it prefers what is shown first, unless two judges disagree."""

    name = "stub"

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        self.prompts += prompts
        for i, p in reversed(list(enumerate(prompts))):
            last = p.messages[-1][1]
            marks = [int(q) for q in re.findall(r"q=(\d)", last)]
            if "from 0" in p.messages[0][1]:
                yield i, Answer(str(marks[0]))
            elif len(marks) < 2:
                yield i, Answer("noted")
            else:
                bias = 0 if "disagree" in last else 3
                word = "ab"[marks[0] + bias < marks[1]]
                yield i, Answer(f"Output ({word})" if p.options else f"Output ({word}) is better.")


def _pairs(n: int = 60) -> tuple[list[dict[str, Any]], np.ndarray]:
    rng = np.random.default_rng(0)
    rows = []
    for a, gap in rng.integers((0, 1), 10, (n, 2)):
        b = (a + gap) % 10  # never the same
        rows.append({"input": f"Do it {len(rows)}.", "output_1": f"first q={a}", "output_2": f"second q={b}", "label": 1 if a >= b else 2})
    return rows, np.array([r["label"] for r in rows])


def test_swap_raises_the_agreement_of_a_judge_that_likes_a_place() -> None:
    pairs, labels = _pairs()
    found = {s: measure(ask(Desk(Stub()), pairs, STRATEGIES[s])[0], labels) for s in ("rules", "cot", "swap", "swap_cot")}
    assert found["cot"]["agreement"] == found["rules"]["agreement"] < 80 and found["cot"]["by_place"]["first"] > 20
    for s in ("swap", "swap_cot"):
        assert found[s]["agreement"] == 100 and found[s]["accuracy"] > found["cot"]["accuracy"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_judges_both_orders_with_the_parts_it_promises(name: str) -> None:
    pairs, labels = _pairs(12)
    s, stub = STRATEGIES[name], Stub()
    verdicts, _ = ask(Desk(stub), pairs, s)
    assert verdicts.shape == (2, 12) and measure(verdicts, labels)["unparsed"] == 0
    judged = [p for p in stub.prompts if "q=" in p.messages[-1][1] and "disagree" not in p.messages[-1][1]]
    assert len(judged) == 24 and len(stub.prompts) >= 24 + 12 * (s.questions + s.reference)
    assert len({p.messages for p in judged}) == 24, "each order is another prompt"
    assert all(("no more and no less" in p.messages[0][1]) == s.rules and len(p.messages) == 2 + 2 * s.shots for p in judged)
    assert all((s.questions, s.reference) == ("Questions to ask" in p.messages[-1][1], "of your own" in p.messages[-1][1]) for p in judged)


def test_each_explanation_is_shown_for_the_output_that_it_speaks_for() -> None:
    class Opposed(Stub):
        def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            for i, p in enumerate(prompts):
                self.prompts.append(p)
                first = re.search(r"Output \(a\):\n(\w+)", p.messages[-1][1])[1]
                yield i, Answer(f"Output (a) is the {first} one. Output (a) is better.")

    stub = Opposed()
    ask(Desk(stub), _pairs(1)[0], STRATEGIES["swap"])
    straight, turned = (p.messages[-1][1] for p in stub.prompts[2:])
    assert "(a) is better:\nOutput (a) is the first one." in straight and "(b) is better:\nOutput (b) is the second one." in straight
    assert "(a) is better:\nOutput (a) is the second one." in turned and "(b) is better:\nOutput (b) is the first one." in turned
    assert swap_names(straight.split("Two judges")[1]) != straight


def test_requests_that_failed_leave_verdicts_unparsed_and_are_counted() -> None:
    class Broken(Stub):
        def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            yield from ((i, Answer(status="timeout", troubles=("timeout", "timeout"))) for i in range(len(prompts)))

    desk = Desk(Kept(Broken()))
    verdicts, _ = ask(desk, _pairs(5)[0], STRATEGIES["metrics"])
    assert (verdicts == 0).all() and desk.plain()["failed"] == {"timeout": 15} and desk.plain()["troubles_on_the_way"] == {"timeout": 30}


class Says(Stub):
    """Gives the same answer to everything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        yield from ((i, Answer(self.text, "ok" if self.text else "empty")) for i in range(len(prompts)))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<think>Output (b) is longer.\nOutput (b)</think>\n\nOutput (a)", 1),
        ("I look at both.</think>Output (a)", 1),
        ("<think>Output (a), or is it", 0),
        ("Output (a)", 1),
    ],
)
def test_what_a_judge_thinks_before_its_verdict_is_no_part_of_it(text: str, read: int) -> None:
    verdicts, _ = ask(Desk(Says(text)), _pairs(1)[0], STRATEGIES["rules"])
    assert verdicts[0, 0] == read
    assert Desk(Says("<think>3, no 9</think> 7"))([Prompt((("user", "?"),))])[0].text == "7"


def test_verdicts_that_were_not_given_agree_with_nothing_and_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.judge import llmbar

    monkeypatch.setattr(llmbar, "open_judge", lambda *args: Kept(Says("")))
    result = modelwright.run("judge.llmbar", pairs=TINY / "datasets.json", subsets=["Natural"], strategies=["rules"])
    (row,) = result.plain()["metrics"]["averages"]
    assert row["overall"]["agreement"] == 0 and row["overall"]["unparsed"] == 100
    assert "6 of 6 verdicts were not given in a readable form" in result.steps[0]["text"]


def test_two_pairs_have_a_wide_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelwright.judge import llmbar

    monkeypatch.setattr(llmbar, "open_judge", lambda *args: Kept(Says("Output (a)")))
    result = modelwright.run("judge.llmbar", pairs=TINY / "datasets.json", subsets=["Natural"], strategies=["rules"], limit=2)
    (row,) = result.plain()["metrics"]["averages"]
    assert row["overall"]["accuracy"] == 50 and row["overall"]["accuracy_interval"] == pytest.approx([9.45, 90.55], abs=0.01)
    assert "9.5 to 90.5" in str(result.steps[0]["tables"]) and "9.5 to 90.5" in str(result.steps[0]["tiles"])


@pytest.mark.parametrize("base", ["seedling", "stories"])
def test_a_real_checkpoint_judges_end_to_end_and_is_resumed(base: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = str(request.getfixturevalue("stories")) if base == "stories" else base
    knobs = {"pairs": TINY / "datasets.json", "subsets": ["Natural"], "cache": tmp_path / "kept.jsonl"}
    by_logits = {"strategies": ["vanilla", "rules", "rating"], "verdict": "logits"}
    first = modelwright.run("judge.llmbar", base=base, to=tmp_path / "out", **knobs, **by_logits)
    metrics = first.plain()["metrics"]
    assert metrics["requests"]["requests"] == 18 and not metrics["requests"]["failed"]
    assert all(r["unparsed"] == 0 and 0 <= r["accuracy"] <= 100 for r in metrics["runs"])
    kept = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert np.array(kept["runs"][0]["p_first"]).shape == (2, 3) and "accuracy_of_mean_probability" in metrics["runs"][0]
    again = modelwright.run("judge.llmbar", base=base, **knobs, **by_logits).plain()["metrics"]
    assert again["runs"] == metrics["runs"] and again["requests"]["reused"] == 18 and again["requests"]["tokens_in"] == 0
    text = modelwright.run("judge.llmbar", base=base, strategies=["vanilla"], limit=1, **knobs).plain()["metrics"]
    assert text["requests"]["tokens_out"] > 0 and text["runs"][0]["unparsed"] == 100, "it has not learnt to answer"


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({}, "nothing to judge was given; give --pairs FILE, or --replay FOLDER"),
        ({"pairs": "datasets.json"}, "no judge was given; give a checkpoint with --base"),
        ({"pairs": "datasets.json", "strategies": ["metric"]}, "unknown strategy 'metric'; did you mean 'metrics'?"),
        ({"pairs": "datasets.json", "subsets": ["Natral"]}, "unknown subset 'Natral'; did you mean 'natural'?"),
        (
            {"pairs": "datasets.json", "strategies": ["cot"], "verdict": "logits"},
            "verdict=logits does not fit cot, because its verdict comes",
        ),
        ({"pairs": "chains.jsonl"}, "chains.jsonl has no column 'input'"),
        ({"pairs": "nothing.jsonl"}, "nothing.jsonl is empty"),
        ({"pairs": "label.jsonl"}, "label.jsonl has label 3, because it must be 1 or 2"),
        ({"pairs": "null.json"}, "has no text in output_1, because it holds 'None'"),
        ({"pairs": "gone.json"}, "no file at "),
        ({"replay": "gone"}, "no folder at "),
        ({"replay": "bare"}, "no file at "),
        ({"pairs": "datasets.json", "url": "http://127.0.0.1:9/v1"}, "no model was named"),
        ({"pairs": "datasets.json", "url": "ftp://x", "model": "m"}, "url=ftp://x is no address"),
        ({"pairs": "datasets.json", "url": "http://k:s@x/v1", "model": "m"}, "url holds more than an address"),
        (
            {"pairs": "datasets.json", "url": "https://example.invalid/v1", "model": "m", "endpoint": {"key": "NO_SUCH_KEY"}},
            "NO_SUCH_KEY is not set",
        ),
        ({"pairs": "datasets.json", "url": "http://localhost:9/v1", "model": "m", "endpoint": {"retry": 1}}, "did you mean 'retries'?"),
        (
            {"pairs": "datasets.json", "url": "http://127.0.0.1:9/v1", "model": "m", "endpoint": {"retries": 0}},
            "no endpoint answers at http://127",
        ),
    ],
)
def test_bad_input_is_one_sentence(knobs: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "null.json").write_text('{"s": [{"input": "x", "output_1": null, "output_2": "z", "label": 1}]}')
    (tmp_path / "label.jsonl").write_text('{"input": "x", "output_1": "y", "output_2": "z", "label": 3}\n')
    given = {k: tmp_path / v if k in ("pairs", "replay") else v for k, v in knobs.items()}
    with pytest.raises(UserError) as error:
        modelwright.run("judge.llmbar", **given)
    assert sentence in str(error.value) and "\n" not in str(error.value)
