"""A judge behind any OpenAI-compatible endpoint, over the standard library: `url` is the part before /chat/completions.

Time-outs, refused connections, 429, 5xx and answers that are not what they should be are tried again, each time after a
longer wait with full jitter, or after what Retry-After asks for; every failure is counted by its kind. What no repetition
can mend (a wrong key, an unknown model) stops the run with one sentence, as do an endpoint that cannot be reached from the
start and three refused requests before the first answer; a refusal later on costs that request alone. The key comes from an
environment variable and is never written, and no redirection is followed, because it would carry the key elsewhere.
"""

import email.utils
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from modelwright.core.errors import UserError
from modelwright.core.knobs import build, knob
from modelwright.judge.ask.protocol import Answer, Prompt


@dataclass(frozen=True)
class Limits:
    key: str = knob("OPENAI_API_KEY", "environment variable that holds the API key; empty: none is sent; a local address needs none")
    timeout: float = knob(60.0, "seconds without a byte until a request is given up", low=0.01)
    retries: int = knob(5, "repetitions of a failed request", low=0)
    backoff: float = knob(1.0, "seconds: upper bound of the first wait, doubled each time, at most 60", low=0)
    rate: float = knob(0.0, "requests per minute, at most; 0: no limit", low=0)
    workers: int = knob(8, "requests under way at a time", low=1)
    price_in: float = knob(0.0, "price of a million prompt tokens", low=0)
    price_out: float = knob(0.0, "price of a million answer tokens", low=0)
    logprobs: bool = knob(False, "ask for log-probabilities, from which verdict probabilities are read")
    body: dict[str, Any] = knob({}, "more fields of each request; a null takes a field away, as in {max_tokens: null}")


class _Failure(Exception):
    """A request that failed: its kind, what was said, the seconds to wait, and whether a repetition could help."""

    def __init__(self, kind: str, said: str = "", wait: float = 0.0, again: bool = True):
        super().__init__(said)
        self.kind, self.said, self.wait, self.again = kind, said, wait, again


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def open_endpoint(url: str, model: str | None, limits: dict[str, Any]) -> "Endpoint":
    """The endpoint that a step's settings name. Raises UserError for no model, an address that is none, a missing key."""
    found: Limits = build(Limits, limits, "endpoint")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url={url} is no address", how="write it as in https://api.openai.com/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("url holds more than an address", "a key in it would be written down", "give the key by endpoint.key")
    if not model:
        raise UserError("no model was named", f"{url} may serve several", "give --model NAME")
    key = os.environ.get(found.key, "") if found.key else ""
    if found.key and not key and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"the environment variable {found.key} is not set", f"{url} needs a key", "set it, or name another: endpoint.key")
    return Endpoint(url, model, found, key)


class Endpoint:
    """Answers come as they are ready. `name` is the address and the model, and never the key."""

    def __init__(self, url: str, model: str, limits: Limits, key: str = ""):
        self.url, self.model, self.limits, self._key = url.rstrip("/") + "/chat/completions", model, limits, key
        self.name = f"{model} at {url}" + (f" with {json.dumps(limits.body, sort_keys=True)}" if limits.body else "")
        self._opener = urllib.request.build_opener(_Stay())
        self._lock, self._next = threading.Lock(), 0.0
        self._reached, self._answered, self._refused = False, False, 0
        self._stop = threading.Event()

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        self._stop.clear()
        pool = ThreadPoolExecutor(self.limits.workers)
        try:
            places = {pool.submit(self._one, p): i for i, p in enumerate(prompts)}
            for done in as_completed(places):
                yield places[done], done.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, prompt: Prompt) -> Answer:
        troubles: list[str] = []
        bound = self.limits.backoff
        while True:
            try:
                self._turn()
                answer = self._post(prompt)
                self._answered = True
                return replace(answer, troubles=tuple(troubles))
            except _Failure as failure:
                troubles.append(failure.kind)
                if not failure.again or len(troubles) > self.limits.retries or self._stop.is_set():
                    if self._hopeless(failure):
                        raise self._sentence(failure) from None
                    return Answer(status=failure.kind, troubles=tuple(troubles), said=self._clean(failure.said))
                self._stop.wait(failure.wait or random.uniform(0, bound))  # noqa: S311 - jitter
                bound = min(60.0, 2 * bound)

    def _hopeless(self, failure: _Failure) -> bool:
        self._refused += failure.kind == "refused"
        return not self._reached or failure.kind in _NO_WAY or (not self._answered and self._refused >= 3)

    def _turn(self) -> None:
        """Wait for this request's place in the rate."""
        if not self.limits.rate:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 60 / self.limits.rate
        self._stop.wait(at - now)

    def _post(self, prompt: Prompt) -> Answer:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in prompt.messages],
            "max_tokens": prompt.max_tokens or 16,  # an endpoint gives probabilities of what it writes
            "temperature": prompt.temperature,
        }
        if prompt.options and self.limits.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        body = {k: v for k, v in (body | self.limits.body).items() if v is not None}
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), head)  # noqa: S310 - http or https, checked
        try:
            with self._opener.open(request, timeout=self.limits.timeout) as response:
                said = response.read()
        except urllib.error.HTTPError as error:
            self._reached = True
            raise _failure_of(error) from None
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise _Failure("timeout" if isinstance(reason, TimeoutError) else "connection", str(reason)) from None
        self._reached = True
        return self._read(said, prompt)

    def _read(self, said: bytes, prompt: Prompt) -> Answer:
        try:
            reply = json.loads(said)
        except (ValueError, RecursionError):
            raise _Failure("not JSON") from None
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            used = reply.get("usage") or {}
            tokens = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)
            cut = choice.get("finish_reason") == "length"
            status = "cut" if cut else "ok" if text.strip() else "empty"
            cost = (tokens[0] * self.limits.price_in + tokens[1] * self.limits.price_out) / 1e6
            return Answer(text.strip(), status, _weigh(choice.get("logprobs"), prompt.options), *tokens, cost)
        except (TypeError, LookupError, ValueError, AttributeError):
            raise _Failure("no answer in it") from None

    def _clean(self, said: str) -> str:
        said = " ".join(said.split())[:200]
        return said.replace(self._key, "***") if self._key else said

    def _sentence(self, failure: _Failure) -> UserError:
        if not self._reached:
            return UserError(f"no endpoint answers at {self.url}", self._clean(failure.said), "check the address, or start the server")
        what = f"{self.url} refuses the requests" + (f" with {failure.kind}" if failure.kind in _NO_WAY else "")
        return UserError(what, self._clean(failure.said), _NO_WAY.get(failure.kind, "check the model and endpoint.body"))


_NO_WAY = {"401": "check the key", "403": "check the key", "404": "check the address and the model's name"}


def _failure_of(error: urllib.error.HTTPError) -> _Failure:
    with error:
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, HTTPException):
            said = ""
    kind = {408: "timeout", 429: "rate limit", 401: "401", 403: "403", 404: "404"}.get(error.code)
    kind = kind or ("server error" if error.code >= 500 else "refused")
    again = kind in ("timeout", "rate limit", "server error")
    return _Failure(kind, said or error.reason, _seconds(error.headers.get("Retry-After")), again)


def _seconds(value: str | None) -> float:
    """Retry-After: seconds or a date; 0 when it says neither. At most ten minutes."""
    try:
        wait = float(value or 0)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(600.0, max(0.0, wait)) if math.isfinite(wait) else 0.0


def _weigh(logprobs: Any, options: Sequence[str]) -> tuple[float, ...] | None:
    """Probabilities of the options, where the answer gets as far as what they have in common; None where it does not say."""
    common = os.path.commonprefix(list(options))
    tails = [o[len(common) :] for o in options]
    said = ""
    try:
        for token in logprobs["content"] if options else ():
            if said.strip() == common.strip():
                mass = [0.0] * len(options)
                for t in token["top_logprobs"]:
                    word = t["token"] if common else t["token"].lstrip()
                    fits = [i for i, tail in enumerate(tails) if word and (tail.startswith(word) or word.startswith(tail))]
                    if len(fits) == 1:
                        mass[fits[0]] += math.exp(t["logprob"])
                return tuple(m / sum(mass) for m in mass)
            said += token["token"]
    except (TypeError, LookupError, ValueError, ZeroDivisionError):
        pass
    return None
