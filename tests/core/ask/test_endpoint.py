"""An endpoint that misbehaves in every way it can, on this machine."""

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import modelwright
from modelwright.core.ask.desk import Desk
from modelwright.core.ask.endpoint import open_endpoint
from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import Prompt
from modelwright.core.ask.replies import seconds, weigh
from modelwright.core.errors import UserError

TINY = Path(__file__).parents[2] / "judge" / "tiny"
FAST = {"backoff": 0.01, "timeout": 0.3, "retries": 2, "workers": 4}


class Server(ThreadingHTTPServer):
    """Replies as `behave(text, times seen)` says: a status with headers, bytes, seconds to hang, or a text to answer with."""

    daemon_threads = True

    def __init__(self, behave: Callable[[str, int], Any]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen, self.heads, self.bodies = behave, Counter[str](), [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.seen[text] += 1
            times = server.seen[text]
            server.heads.append({k.lower(): v for k, v in self.headers.items()})
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
        said = server.behave(text, times)
        if isinstance(said, float):
            time.sleep(said)
            said = "late"
        code, head = said if isinstance(said, tuple) else (200, {})
        if isinstance(said, str):
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            said = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()
        with server.lock:
            server.now -= 1
        try:
            self.send_response(code)
            for name, value in head.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said if isinstance(said, bytes) else b'{"error": {"message": "no: secret-key"}}')
        except OSError:
            pass  # the client has left

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Server]]:
    running = []

    def start(behave: Callable[[str, int], Any]) -> Server:
        server = Server(behave)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def prompts(*texts: str, **settings: Any) -> list[Prompt]:
    return [Prompt((("user", t),), **settings) for t in texts]


BAD: dict[str, Any] = {
    "hangs": 0.6,
    "busy": (429, {}),
    "down": (503, {}),
    "garbage": b"\xff\xfe\x00 not json",
    "page": b"<html>502</html>",
    "hollow": b'{"object": "nothing"}',
    "bare": b"[1, 2]",
    "long": (400, {}),
}


def test_every_failure_is_counted_by_its_kind_nothing_is_lost_and_the_cache_resumes(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text, times: "" if text == "empty" else BAD.get(text, f"to {text}"))
    desk = Desk(Kept(open_endpoint(server.url, "m", FAST | {"price_in": 10, "price_out": 20}), tmp_path / "kept.jsonl"))
    texts = ["good", "empty", *BAD, "better"]
    answers = dict(zip(texts, desk(prompts(*texts)), strict=True))
    assert {t: a.status for t, a in answers.items()} == {
        "good": "ok", "empty": "empty", "hangs": "timeout", "busy": "rate limit", "down": "server error", "garbage": "not JSON",
        "page": "not JSON", "hollow": "no answer in it", "bare": "no answer in it", "long": "refused", "better": "ok",
    }  # fmt: skip
    counts = desk.plain()
    assert counts["requests"] == 11 and counts["answers"] == {"ok": 2, "empty": 1} and sum(counts["failed"].values()) == 8
    assert counts["troubles_on_the_way"] == {
        "timeout": 3, "rate limit": 3, "server error": 3, "not JSON": 6, "no answer in it": 6, "refused": 1
    }  # fmt: skip
    assert counts["cost"] == pytest.approx(3 * (100 * 10 + 10 * 20) / 1e6) and counts["tokens_in"] == 300
    server.behave = lambda text, times: f"to {text}"  # it is well again
    later = Desk(Kept(open_endpoint(server.url, "m", FAST), tmp_path / "kept.jsonl"))
    before = server.seen.copy()
    assert [a.text for a in later(prompts(*texts))] == ["to good", "", *(f"to {t}" for t in (*BAD, "better"))]
    assert set(server.seen - before) == set(BAD) and later.plain()["reused"] == 3 and not later.plain()["failed"]


def test_a_request_that_fails_twice_and_then_works_is_an_answer_with_its_troubles(serve: Any) -> None:
    server = serve(lambda text, times: [(429, {"Retry-After": "0"}), b"?", "fine"][times - 1])
    desk = Desk(open_endpoint(server.url, "m", FAST))
    (answer,) = desk(prompts("x"))
    assert answer.text == "fine" and answer.troubles == ("rate limit", "not JSON") and not desk.plain()["failed"]


def test_retry_after_is_honoured(serve: Any) -> None:
    server = serve(lambda text, times: (429, {"Retry-After": "0.4"}) if times == 1 else "fine")
    began = time.monotonic()
    assert Desk(open_endpoint(server.url, "m", FAST))(prompts("x"))[0].text == "fine" and time.monotonic() - began >= 0.4
    assert 0 < seconds(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert [seconds(v) for v in (None, "", "soon", "-5", "nan", "1e9")] == [0, 0, 0, 0, 0, 600]


def test_requests_run_side_by_side_and_no_more_than_allowed(serve: Any) -> None:
    gate = threading.Barrier(3, timeout=5)

    def together(text: str, times: int) -> str:
        gate.wait()  # three at a time, or nobody passes
        return "ok"

    server = serve(together)
    assert len(Desk(open_endpoint(server.url, "m", FAST | {"workers": 3, "timeout": 6}))(prompts(*"abcdef"))) == 6 and server.most == 3


def test_the_rate_spaces_requests(serve: Any) -> None:
    server = serve(lambda text, times: "ok")
    began = time.monotonic()
    Desk(open_endpoint(server.url, "m", FAST | {"rate": 1200}))(prompts(*"abcdef"))
    assert time.monotonic() - began >= 5 * 0.05


def test_the_key_is_sent_and_never_written(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    server = serve(lambda text, times: "ok" if text == "a" else (400, {}))
    desk = Desk(Kept(open_endpoint(server.url, "m", FAST | {"key": "MY_KEY"}), tmp_path / "kept.jsonl"))
    desk(prompts("a"))
    assert server.heads[0]["authorization"] == "Bearer secret-key"
    assert "***" in desk(prompts("b"))[0].said
    assert "secret-key" not in (tmp_path / "kept.jsonl").read_text() + json.dumps(desk.plain())
    server.behave = lambda text, times: (401, {})
    with pytest.raises(UserError, match=r"refuses the requests with 401.*no: \*\*\*.*check the key"):
        desk(prompts("c"))


KEY = "sk-secret-0123456789abcdef"


@pytest.mark.parametrize("key", [KEY + "\r", KEY + "\n", "\t" + KEY, KEY + "ä", KEY + "\u200b", "sk secret " + KEY], ids=ascii)
def test_a_key_that_no_header_takes_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="the key in MY_KEY holds a ") as error:
        open_endpoint("http://127.0.0.1:9/v1", "m", {"key": "MY_KEY"})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "limits", "sentence"),
    [
        ("http://h/v1", {"key": KEY}, "endpoint.key names no environment variable"),
        ("http://localhost/v1", {"key": KEY}, "endpoint.key names no environment variable"),
        ("http://localhost/v1", {"key": "SKSECRET0123456789"}, "endpoint.key names no environment variable"),
        (f"http://localhost/v1#{KEY}", {}, "url holds more than an address"),
        (f"http://localhost/v1?key={KEY}", {}, "url holds more than an address"),
        (f"http://localhost/v1;{KEY}", {}, "url holds more than an address"),
        (f"http://me:{KEY}@localhost/v1", {}, "url holds more than an address"),
        (f"ftp://localhost/{KEY}", {}, "url=... is no address"),
        (f"http://localhost:{KEY}/v1", {}, "url is no address"),
        (f"http://[{KEY}/v1", {}, "url is no address"),
        (f"http://{KEY * 4}/v1", {}, "url is no address"),
        ("http://localhost/v1", {"body": {"api_key": KEY}}, "endpoint.body.api_key looks like a secret"),
        ("http://localhost/v1", {"key": "MY_KEY", "body": {"user": f"me {KEY}"}}, "the key stands in the settings"),
        (f"http://localhost/{KEY}/v1", {"key": "MY_KEY"}, "the key stands in the settings"),
    ],
)
def test_a_key_in_the_settings_is_refused_without_being_shown(
    url: str, limits: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    knobs = {"pairs": TINY / "datasets.json", "strategies": ["rules"], "url": url, "model": "m", "endpoint": limits}
    with pytest.raises(UserError) as error:
        modelwright.run("judge.llmbar", to=tmp_path / "out", **knobs)
    assert sentence in str(error.value) and "secret" not in str(error.value).lower().replace("looks like a secret", "")
    assert not list(tmp_path.rglob("*")), "nothing was written"


def test_an_echoed_key_is_masked_before_it_is_kept_shown_or_cut(serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    long = json.dumps({"error": {"message": "x" * 165 + KEY}}).encode()

    def behave(text: str, times: int) -> Any:
        if "Your rating?" in text:
            return f"cut off at {KEY[:15]}"
        return f"Output (a) {KEY}" if times == 1 else (500, {"X": long})

    server = serve(behave)
    limits = FAST | {"key": "MY_KEY", "retries": 0}
    knobs = {"pairs": TINY / "datasets.json", "strategies": ["rules", "rating"], "url": server.url, "model": "m", "endpoint": limits}
    result = modelwright.run("judge.llmbar", to=tmp_path / "out", **knobs)
    written = "".join(f.read_text(errors="replace") for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert "Output (a) ***" in written and KEY[:8] not in written + json.dumps(result.plain(), default=str)
    endpoint = open_endpoint(server.url, "m", limits)
    for at in range(150, 200):  # wherever the sentence is cut
        assert "sk" not in endpoint._clean("x" * at + KEY) and len(endpoint._clean("x" * at + KEY)) <= 203
    assert endpoint._clean("say EMPTY") == "say EMPTY"


def test_a_short_key_guards_nothing_and_changes_no_answer(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    assert (
        Desk(open_endpoint(serve(lambda text, times: "an EMPTY set").url, "m", {"key": "MY_KEY"}))(prompts("a"))[0].text == "an EMPTY set"
    )


def test_no_key_no_header(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    for name in ("OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = serve(lambda text, times: "ok")
    Desk(open_endpoint(server.url, "m", FAST))(prompts("a"))
    assert "authorization" not in server.heads[0] and KEY not in str(server.heads)


def test_odd_numbers_and_letters_in_a_reply_are_read_as_what_they_are(serve: Any) -> None:
    def reply(text: str, times: int) -> bytes:
        message = {"role": "assistant", "content": "Output (a) \ud800"}
        usage = {"bad usage": '{"prompt_tokens": 1e999, "completion_tokens": -3}', "no usage": "null", "true": '{"prompt_tokens": true}'}
        tokens = [{"token": "Output ("}, {"token": "a", "top_logprobs": [{"token": "a", "logprob": 1e9}, {"token": "b", "logprob": -1}]}]
        choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": tokens}}
        return (json.dumps({"choices": [choice]})[:-1] + f', "usage": {usage[text]}}}').encode()

    desk = Desk(open_endpoint(serve(reply).url, "m", FAST | {"price_in": 1}))
    asked = prompts("bad usage", "no usage", "true", options=("Output (a)", "Output (b)"))
    assert {(a.text, a.status, a.probabilities, a.tokens_in, a.cost) for a in desk(asked)} == {("Output (a) \ufffd", "ok", None, 0, 0)}
    assert desk.plain()["troubles_on_the_way"] == {"usage not readable": 2}


def test_half_a_surrogate_pair_in_a_prompt_is_asked_all_the_same(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda text, times: "ok")
    assert Desk(Kept(open_endpoint(server.url, "m", FAST), tmp_path / "k.jsonl"))(prompts("a\ud800"))[0].text == "ok"
    assert server.bodies[0]["messages"][0]["content"] == "a\ufffd"


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"timeout": 1e308}, "out of range"),
        ({"backoff": 1e308}, "out of range"),
        ({"retries": 10**9}, "out of range"),
        ({"workers": 10**9}, "out of range"),
        ({"price_in": 1e308}, "out of range"),
        ({"rate": 5e-324}, "out of range"),
        ({"body": {"temperature": float("nan")}}, "endpoint.body is no JSON"),
        ({"body": {"stop": date(2024, 1, 1)}}, "endpoint.body is no JSON"),
        ({"body": {"model": None}}, "endpoint.body names the model"),
    ],
    ids=str,
)
def test_a_setting_that_no_request_can_carry_is_one_sentence(limits: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_endpoint("http://localhost:9/v1", "m", limits)


def test_without_the_package_an_endpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"the package openai is not installed.*pip install 'modelwright\[endpoint\]'"):
        open_endpoint("http://localhost:9/v1", "m", {})


def test_a_run_that_is_given_up_leaves_no_thread_and_no_request(serve: Any) -> None:
    server = serve(lambda text, times: "ok" if text == "a" else 0.2)
    answers = open_endpoint(server.url, "m", FAST | {"workers": 2}).ask(prompts(*"abcdefgh"))
    next(answers)
    answers.close()
    assert sum(server.seen.values()) <= 3 and "modelwright endpoint" not in {t.name for t in threading.enumerate()}


def test_an_endpoint_is_asked_from_within_an_event_loop(serve: Any) -> None:
    """As in a notebook."""
    server = serve(lambda text, times: "ok")

    async def cell() -> str:
        return Desk(open_endpoint(server.url, "m", FAST))(prompts("a"))[0].text

    assert asyncio.run(cell()) == "ok"


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [((404, {}), "with 404"), ((400, {}), "check the model and endpoint.body"), ((302, {"Location": "http://127.0.0.1:9/"}), "refuses")],
)
def test_what_no_repetition_mends_stops_the_run(serve: Any, reply: Any, sentence: str) -> None:
    server = serve(lambda text, times: reply)
    with pytest.raises(UserError, match=sentence):
        Desk(open_endpoint(server.url, "m", FAST))(prompts(*"abcdefgh"))
    assert sum(server.seen.values()) <= 8, "nothing was asked twice"


def test_the_body_can_be_changed_and_is_part_of_the_name(serve: Any) -> None:
    server = serve(lambda text, times: "ok")
    endpoint = open_endpoint(server.url + "/", "m", FAST | {"body": {"max_tokens": None, "max_completion_tokens": 9}})
    Desk(endpoint)(prompts("a"))
    assert "max_tokens" not in server.bodies[0] and server.bodies[0]["max_completion_tokens"] == 9 and "max_completion" in endpoint.name


def test_probabilities_are_read_where_the_options_part() -> None:
    def token(text: str, *others: tuple[str, float]) -> dict[str, Any]:
        return {"token": text, "top_logprobs": [{"token": t, "logprob": p} for t, p in others]}

    options = ("Output (a)", "Output (b)")
    said = {"content": [token("Output"), token(" ("), token("a", ("a", -0.5), ("b", -1.5), ("c", -1.0)), token(")")]}
    a, b = weigh(said, options) or (0, 0)
    assert a + b == pytest.approx(1) and a / b == pytest.approx(2.718281828)
    assert weigh({"content": [token("I")]}, options) is None and weigh(None, options) is None and weigh(said, ()) is None
    assert weigh({"content": [token("7", ("7", -1.0), ("8", -1.0))]}, tuple("0123456789")) == (0,) * 7 + (0.5, 0.5, 0)


def test_a_whole_step_survives_a_bad_endpoint_and_reports_it(serve: Any, tmp_path: Path) -> None:
    kinds = [(429, {}), b"?", "", "Output (a)", "Output (b)", (500, {})]
    server = serve(lambda text, times: kinds[hash_of(text) % len(kinds)])
    knobs = {
        "pairs": TINY / "datasets.json",
        "url": server.url,
        "model": "m",
        "endpoint": FAST | {"retries": 1},
        "strategies": ["rules", "swap", "rating"],
    }
    result = modelwright.run("judge.llmbar", to=tmp_path / "out", **knobs)
    counts = result.plain()["metrics"]["requests"]
    assert counts["requests"] == 14 * 3 and set(counts["failed"]) <= {"rate limit", "not JSON", "server error"}
    assert sum(counts["failed"].values()) + sum(counts["answers"].values()) == counts["requests"]
    assert (tmp_path / "out" / "answers.jsonl").is_file() and "Failures" in (tmp_path / "out" / "report.html").read_text()
    assert "were not answered" in result.steps[0]["text"]


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())
