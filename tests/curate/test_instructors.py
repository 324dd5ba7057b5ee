"""One cycle of LLMs-as-Instructors: nothing is lost, what is kept is right and new, a stopped run pays nothing twice."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from modelwright.core.errors import UserError
from modelwright.runner.run import run
from modelwright.testing import made, write_jsonl


def _cycle(tmp_path: Path, name: str = "out", **knobs: Any) -> Any:
    given = made("lessons", tmp_path) | {"sample_size": 6, "encoder": "words", "rounds": 1} | knobs
    return run("curate.instructors", to=tmp_path / name, **given)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_kept_is_right_and_names_its_origin(tmp_path: Path) -> None:
    result = _cycle(tmp_path)
    rows = _rows(result.to / "dataset.jsonl")
    assert {r["source"] for r in rows} == {1, 3} and {r["scheme"] for r in rows} == {"le"}
    assert all(r["generator"].startswith("recorded") and r["messages"][1]["role"] == "assistant" for r in rows)
    metrics = result.steps[0]["metrics"]
    assert metrics["kept"] == 4 and metrics["removed"] == {"wrong calculation": 2}
    assert metrics["graded"]["number"]["wrong"] == 2 and metrics["lessons"]["number"]["samples_per_call"] == 4
    removed = _rows(result.to / "removed.jsonl")
    assert [r["reason"] for r in removed] == ["wrong calculation"] * 2 and all(r["answer"] for r in removed)


def test_two_runs_with_a_recorded_instructor_are_alike(tmp_path: Path) -> None:
    first, second = (_cycle(tmp_path, name).to / "dataset.jsonl" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_unchecked_samples_are_the_published_way(tmp_path: Path) -> None:
    assert _cycle(tmp_path, verify=False).steps[0]["metrics"]["kept"] == 6


def _asked(folder: Path) -> list[str]:
    return [line for line in (folder / "answers.jsonl").read_text().splitlines() if line]


def test_contrast_without_neighbours_asks_what_error_alone_asks(tmp_path: Path) -> None:
    plain, none, some = (
        _cycle(tmp_path, name, strategy=strategy, k=k) for name, strategy, k in (("a", "le", 3), ("b", "lec", 0), ("c", "lec", 2))
    )
    keys = [[json.loads(row)["key"] for row in _asked(r.to)] for r in (plain, none, some)]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])
    assert some.steps[0]["metrics"]["kept"] == 4  # the wrong question stands last in the message


def test_the_mimic_does_not_see_the_wrong_answer(tmp_path: Path) -> None:
    a, b = (_cycle(tmp_path, name, strategy=name) for name in ("le", "mimic"))
    assert not {json.loads(r)["key"] for r in _asked(a.to)} & {json.loads(r)["key"] for r in _asked(b.to)}


def test_a_sample_of_a_test_set_is_removed_and_an_overlap_reported(tmp_path: Path) -> None:
    test = [{"question": "how much is 39 + 46", "answer": "85"}, {"question": "What is 17 + 25?", "answer": "42"}]
    result = _cycle(tmp_path, tests=[write_jsonl(tmp_path / "test.jsonl", test)])
    metrics = result.steps[0]["metrics"]
    assert metrics["removed"]["repeats a test set"] == 1 and metrics["tasks_in_test_sets"] == 1
    assert "stand in a test set" in result.steps[0]["text"]


def test_the_checkpoint_answers_where_no_answers_are_recorded(tmp_path: Path) -> None:
    given = made("lessons", tmp_path) | {"response": "", "answer_tokens": 4, "sample_size": 2}
    result = run("curate.instructors", base="seedling", to=tmp_path / "out", **given)
    graded = result.steps[0]["metrics"]["graded"]["number"]
    assert graded.get("right", 0) + graded["wrong"] == 4
    assert len((result.to / "student.jsonl").read_text().splitlines()) == 4


def test_a_student_without_room_for_an_answer_is_told_so(tmp_path: Path) -> None:
    given = made("lessons", tmp_path) | {"response": "", "answer_tokens": 100_000}
    with pytest.raises(UserError, match="answered no task, because the first failed with 'too long'; lower --answer-tokens"):
        run("curate.instructors", base="seedling", to=tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"recorded": None}, "no generator was given"),
        ({"generator": "seedling"}, "generator and recorded are given"),
        ({"response": ""}, "no student was given"),
        ({"response": "nowhere"}, "has no text in 'nowhere'"),
        ({"data": None}, "no tasks were given"),
        ({"regrade": "nowhere"}, "no recorded answers"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tmp_path: Path, knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _cycle(tmp_path, **knobs)
    assert not (tmp_path / "out").exists()


def test_tasks_without_gold_answers_and_rows_that_are_no_tasks_are_named(tmp_path: Path) -> None:
    for row, sentence in (({"question": "?", "answer": " "}, "row 1 of .* has no gold answer"), ({"text": "x"}, "row 1 of .* is no task")):
        with pytest.raises(UserError, match=sentence):
            _cycle(tmp_path, data=write_jsonl(tmp_path / "bad.jsonl", [row | {"said": "1"}]))


def test_an_instructor_that_gives_nothing_usable_ends_with_a_sentence(tmp_path: Path) -> None:
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [{"prompt": "What is", "answer": "I am sorry."}])
    with pytest.raises(UserError, match="nothing usable, because 2 no sample in the reply"):
        _cycle(tmp_path, recorded=nothing)


def test_a_student_without_errors_is_told_so(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"question": "What is 1 + 1?", "answer": "2", "said": "2"}])
    with pytest.raises(UserError, match="no errors"):
        _cycle(tmp_path, data=good)


# ---- a live instructor ------------------------------------------------------------------------------------------------
class _Instructor(BaseHTTPRequestHandler):
    """Answers about one of the two questions at first; the other fails in every way there is before it is answered."""

    failures: list[Any] = []
    asked: list[str] = []

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        type(self).asked.append(text)
        if "56 + 27" in text and self.failures:
            failure = self.failures.pop(0)
            if failure == "cut":
                self.connection.close()
                return
            if isinstance(failure, int):
                self.send_response(failure)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._say(failure)
            return
        said = "### Question 1\nHow much is 4 + 5?\n### Answer 1\n4 + 5 = 9\n#### 9"
        if "56 + 27" in text:
            said = said.replace("4 + 5", "6 + 5").replace("9", "11")
        self._say(json.dumps({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}))

    def _say(self, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def live() -> Iterator[str]:
    _Instructor.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Instructor)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


EIGHT_WAYS = [500, 503, 429, 408, "no json", '{"choices": []}', '{"choices": [{"message": null}]}', "cut"]


def test_a_failing_instructor_loses_nothing_and_is_not_paid_twice(tmp_path: Path, live: str) -> None:
    pytest.importorskip("openai")
    _Instructor.failures = list(EIGHT_WAYS)
    common = {"url": live, "model": "m", "recorded": None, "cache": str(tmp_path / "kept.jsonl"), "rounds": 1}
    impatient = common | {"endpoint": {"key": "", "retries": 2, "backoff": 0.0, "workers": 1}}
    first = _cycle(tmp_path, "first", **impatient).steps[0]["metrics"]
    assert first["kept"] == 1 and sum(first["requests"]["failed"].values()) == 1
    assert sum(n for reason, n in first["removed"].items() if reason.startswith("request failed")) == 1
    patient = common | {"endpoint": {"key": "", "retries": 9, "backoff": 0.0, "workers": 1}}
    second = _cycle(tmp_path, "second", **patient).steps[0]["metrics"]
    assert second["kept"] == 2 and second["requests"]["reused"] == 1 and not second["requests"]["failed"]
    assert len([text for text in _Instructor.asked if "38 + 44" in text]) == 1
    assert sum(second["requests"]["troubles_on_the_way"].values()) == 5
