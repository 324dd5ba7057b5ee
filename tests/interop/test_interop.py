"""The judge of `make interop`: what counts as equal, what does not, and that nothing is green in silence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import environments
import pytest
import run
from cases import CHAT, SOURCES, Case, cases

from modelwright import registry


def one(ids: list[int], *, margin: float = 1.0, ended: str = "length", begin: int = 5, shift: float = 0.0) -> dict[str, Any]:
    return {
        "ids": ids,
        "logprobs": [-1.0 + shift for _ in ids],
        "margin": [1.0] * (len(ids) - 1) + [margin],
        "ended": ended,
        "begin": begin,
    }


def answer(*texts: dict[str, Any], chats: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"class": "LlamaForCausalLM", "texts": list(texts), "chats": list(chats)}


TWO = (one([1, 2, 3]), one([4, 5, 6]))


@pytest.mark.parametrize(
    ("theirs", "verdict", "why"),
    [
        (answer(*TWO), "equal", ""),
        (answer(TWO[0], one([4, 5, 7])), "differs", "another token at place 3 of 3"),
        (answer(TWO[0], one([4, 5])), "differs", "another token at place 3 of 3"),
        (answer(TWO[0], one([])), "differs", "another token at place 1 of 3"),
        (answer(TWO[0], one([4, 5, 6], shift=0.01)), "differs", "log-probabilities are off by 1.0e-02"),
        (answer(TWO[0], one([4, 5, 6], begin=6)), "differs", "a prompt of 5 tokens is read as 6"),
        (answer(TWO[0]), "differs", "1 texts instead of 2"),
        ({"error": "ValueError: no"}, "error", "ValueError: no"),
    ],
)
def test_an_engine_is_equal_only_with_the_same_tokens_and_the_same_numbers(theirs: dict[str, Any], verdict: str, why: str) -> None:
    assert run.compare(answer(*TWO), theirs)[:2] == (verdict, why)


def test_a_tie_is_left_out_and_two_prompts_must_remain() -> None:
    ours = answer(*TWO, one([7, 8], margin=1e-4))
    assert run.compare(ours, answer(*TWO, one([7, 9])))[0] == "equal"
    ours = answer(TWO[0], one([7, 8], margin=1e-4))
    assert run.compare(ours, answer(TWO[0], one([7, 8])))[:2] == ("error", "only 1 prompts are clear of ties")


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [("stop", "stop", "equal"), ("stop", "length", "differs"), ("length", "length", "differs")]
)
def test_a_chat_must_end_in_both(ours: str, theirs: str, verdict: str) -> None:
    pair = [answer(*TWO, chats=(one([1, 0], ended=e),)) for e in (ours, theirs)]
    assert run.compare(*pair)[0] == verdict


def test_what_is_known_to_differ_and_no_longer_does_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tune.full", "llama")
    monkeypatch.setattr(run, "KNOWN", [(lambda engine, c, cls: engine == "vllm" and cls == "LlamaForCausalLM", "a reason")])
    assert run.row(case, "vllm", answer(*TWO), answer(*TWO))["verdict"] == "stale"
    assert run.row(case, "vllm", answer(*TWO), {"error": "x"})["verdict"] == "known"
    assert run.row(case, "transformers-4", answer(*TWO), {"error": "x"})["verdict"] == "error"


def test_an_engine_that_cannot_start_is_skipped_with_its_reason_in_the_table() -> None:
    case = Case("tune.full", "llama")
    rows = [
        run.row(case, "vllm", answer(*TWO), "vLLM cannot be installed here: no wheel"),
        run.row(case, "transformers-4", answer(*TWO), answer(*TWO)),
    ]
    assert rows[0]["verdict"] == "skipped"
    page = run.page("2000-01-01", run.NAMES | {"reference": "transformers 5"}, rows)
    assert "no wheel (1: tune.full from llama)" in page
    assert "| tune.full | llama | LlamaForCausalLM | reference | equal 0e+00 | **skipped** |" in page


def test_an_environment_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*command: str) -> str:
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command, stderr="looking\nERROR: No matching distribution found\n")
        return ""

    monkeypatch.setattr(environments, "HOME", tmp_path)
    monkeypatch.setattr(environments, "_run", fails)
    with pytest.raises(environments.Absent, match="cannot be installed here: ERROR: No matching distribution found"):
        environments.python_of("transformers-4")
    assert not (tmp_path / "transformers-4" / "ready").exists(), "the next call tries again"


def test_a_process_that_dies_costs_one_case_and_the_rest_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ask_transformers.py").write_text(
        "import json, os, sys\n"
        "for folder, _ in json.load(sys.stdin)['asked']:\n"
        "    print(json.dumps({'begins': folder}), flush=True)\n"
        "    if folder == 'b': os._exit(3)\n"
        "    print(json.dumps({'class': folder}), flush=True)\n"
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "WORK", tmp_path)
    todo = {Case("m", name): (Path(name), None) for name in "abc"}
    found = {c.source: a for c, a in run._asked("reference", Path(sys.executable), todo, False)}
    assert found["a"] == {"class": "a"} and found["c"] == {"class": "c"} and "ended with code 3" in found["b"]["error"]
    (tmp_path / "ask_transformers.py").write_text("raise SystemExit('no module named x')")
    with pytest.raises(run.Absent, match="does not start here: no module named x"):
        list(run._asked("reference", Path(sys.executable), todo, False))


def test_every_method_that_names_an_engine_is_asked_from_every_family_it_takes() -> None:
    from matrix import ROWS

    asked = {(c.method, c.source) for c in cases()}
    for e in registry.METHODS:
        if "transformers" in e.loads_in:
            assert asked >= {(e.name, f) for f in ROWS[e.name].families}, e.name
    assert {c.source for c in cases()} - {"", "seedling", CHAT} <= SOURCES.keys()
    assert len({c.folder for c in cases()}) == len(cases())


def test_the_request_is_plain_json() -> None:
    assert json.loads(json.dumps(run.REQUEST)) == run.REQUEST and run.REQUEST["n"] == 40
