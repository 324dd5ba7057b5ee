"""The tools: right answers, and a sentence for whatever goes wrong."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.reward.tools.builtin import (
    Bm25,
    calculator,
    day_difference,
    endpoint,
    pass_rate,
    source,
    target_day,
    toolbox,
    value_of,
    week_day,
)
from modelwright.reward.tools.calls import Tool, ToolBox
from modelwright.reward.tools.replay import read_pairs, rerun
from modelwright.reward.tools.traces import Call, Judged, Trace, TracedPair


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("40*4", 160),
        ("(40-4)*(2/3)", 24),
        ("-3 + 2**3", 5),
        ("1,000 / 8", 125),
        ("$7 * 2", 14),
        ("7 // 2 % 2", 1),
        ("2+4+(35/12)+(13/12)+2", 12),
    ],
)
def test_arithmetic(expression: str, value: float) -> None:
    assert value_of(expression) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["__import__('os')", "9**9**9", "1/0", "a+1", "(" * 500, "2**1000000", "''", "1e308*10", "(-8)**0.5", "True"]
)
def test_what_is_no_arithmetic_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(ValueError):
        value_of(text)


def test_the_calculator_checks_each_result_at_its_decimals() -> None:
    assert calculator("<<40*4=160>>160, <<10/3=3.33>>3.33") == "All results are right: 40*4 = 160; 10/3 = 3.3333."
    said = calculator("<<40*4=161>>161, <<10/3=3.34>>, <<x*2=4>>")
    assert said == "3 of 3 results are wrong: 40*4 = 160, not 161; 10/3 = 3.3333, not 3.34; x*2 = no number, not 4."
    assert calculator("2 + 2") == "4"


def test_calendar() -> None:
    assert week_day("2015-03-24") == "Tuesday" and target_day("2013-02-26, -210") == "2012-07-31"
    assert day_difference("2015-11-05, 2011-01-11") == "1759" == day_difference("2011-01-11, 2015-11-05")


def test_bm25_finds_the_passage_with_the_rare_word() -> None:
    found = Bm25(["the cat sat on the mat", "the dog sat", "the the the"])
    assert found("a dog") == "the dog sat" and found("the cat") == "the cat sat on the mat" and found("zebra") == "Nothing was found."
    assert found.scores("dog")[1] == pytest.approx(0.9808 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / 4)), abs=1e-3)  # ln(1 + 2.5 / 1.5) idf


def test_a_tool_that_fails_hangs_or_is_unknown_gives_a_sentence() -> None:
    def angry(text: str) -> str:
        raise RuntimeError("no\nway")

    box = ToolBox([Tool("angry", "", {"a": ""}, angry), Tool("slow", "", {"a": ""}, lambda t: time.sleep(3) or "")], seconds=0.05)
    assert box.observe("angry", "x") == "The tool angry failed: no way."
    assert box.observe("slow", "x") == "The tool slow gave no answer within 0.05 seconds."
    assert box.observe("other", "x") == "There is no tool other."
    assert box.failures == {"angry": 1, "slow": 1, "other": 1}
    tools = toolbox()
    assert tools.observe("Calendar.week_day", "soon").startswith("The tool Calendar.week_day failed:")
    assert tools.observe("history_weather", "x") == "The tool history_weather failed: nothing was given for weather."
    with pytest.raises(UserError, match="there is no tool 'calculater'; did you mean 'calculator'"):
        tools["calculater"]


def test_calls_as_openai_writes_them() -> None:
    tools = toolbox()
    assert len(tools.schemas()) == 9 and json.dumps(tools.schemas())
    target = tools["Calendar.target_day"]
    assert target.schema()["function"]["parameters"]["required"] == ["date", "days"]
    assert target.text() == "Calendar.target_day(date, days): the date some days after another"
    assert tools.observe_json("Calendar_target_day", '{"date": "2000-12-18", "days": 110}') == "2001-04-07"
    assert tools.observe_json("Calendar_target_day", '{"date": 1').startswith("The call of Calendar_target_day cannot be read")


def test_sources_are_recorded_answers_a_corpus_or_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps({"Rome, 2020-01-01": "warm", "x": {"question": "ciao ", "answer": "hello"}}))
    (tmp_path / "c.txt").write_text("one passage\n\nanother one of cats\n")
    recorded = source(str(tmp_path / "w.json"), "weather")
    assert recorded("Rome, 2020-01-01") == "warm" and recorded("ciao") == "hello"
    with pytest.raises(LookupError, match="nothing was recorded"):
        recorded("Paris")
    assert source(str(tmp_path / "c.txt"), "wiki")("cats") == "another one of cats"
    with pytest.raises(UserError, match="no file at"):
        source(str(tmp_path / "none.json"), "weather")
    with pytest.raises(UserError, match="is no endpoint"):
        endpoint("https://example.org/")

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"you asked {self.path}".encode())

        def log_message(self, *a: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert endpoint(f"http://127.0.0.1:{server.server_port}/?q={{input}}")("a b&c") == "you asked /?q=a%20b%26c"
    finally:
        server.shutdown()


def test_code_is_graded_in_the_sandbox() -> None:
    from modelwright.core import sandbox

    try:
        sandbox.run("")
    except UserError:
        pytest.skip("this machine cannot hold the sandbox")
    said = pass_rate("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3"])
    assert said.startswith("The pass rate is 0.5. 1 of 2 tests passed. First failure: AssertionError")
    assert toolbox().observe("code_run", "print(6 * 7)") == "42"
    assert toolbox().observe("code_run", "import os; os.fork()").startswith("It failed")
    pair = TracedPair(
        "q", *(Judged(a, Trace((Call("t", "code_run", "Same", "old"),))) for a in ("x = 1", "x = 2")), tests=("assert x == 1",)
    )
    again = rerun(pair, toolbox())
    assert again.chosen.trace.calls[0].observation == "The pass rate is 1. 1 of 1 tests passed."
    assert "0 of 1" in again.rejected.trace.calls[0].observation


def test_calculator_observations_that_are_made_again_know_no_right_answer(shared: Path) -> None:
    pairs = read_pairs(shared / "tara" / "calculator_test.json.gz")[:40]
    again = [rerun(p, toolbox()) for p in pairs]
    stored = [j.trace.calls[0].observation for p in pairs for j in (p.chosen, p.rejected)]
    made = [j.trace.calls[0].observation for p in again for j in (p.chosen, p.rejected)]
    assert any("predicted answer" in o for o in stored) and not any("predicted" in o for o in made)
    assert sum(o.startswith("All results are right") for o in made) > 40
