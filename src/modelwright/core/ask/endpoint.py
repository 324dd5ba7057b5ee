"""A judge behind any OpenAI-compatible endpoint, over the openai package; `url` is the part before /chat/completions.

The package holds the connections and their time-outs. What it would do on its own after a failure is done here, because every
failure is counted by its kind and an answer that cannot be read is asked for again too: time-outs, refused connections, 429, 5xx
and such answers are repeated, each time after a longer wait with full jitter, or after what Retry-After asks for. What no
repetition can mend (a wrong key, an unknown model) stops the run with one sentence, as do an endpoint that cannot be reached from
the start and three refused requests before the first answer; a refusal later on costs that request alone.

The key comes from an environment variable and is never written (see core/ask/secrets.py). No redirection is followed, because it would
carry the key elsewhere. Requests run in an event loop of their own thread, so that a notebook, which has one already, can ask too.
"""

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.ask.replies import HOPELESS, Failure, failure_of, plain_text, read_reply
from modelwright.core.ask.secrets import Secrets, check_address, check_settings, read_key
from modelwright.core.errors import UserError
from modelwright.core.knobs import build, knob

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_DAY = 86_400.0


@dataclass(frozen=True)
class Limits:
    key: str = knob("OPENAI_API_KEY", "environment variable that holds the API key; empty: none is sent; a local address needs none")
    timeout: float = knob(60.0, "seconds without a byte until a request is given up", low=0.01, high=_DAY)
    retries: int = knob(5, "repetitions of a failed request", low=0, high=1000)
    backoff: float = knob(1.0, "seconds: upper bound of the first wait, doubled each time, at most 60", low=0, high=60)
    rate: float = knob(0.0, "requests per minute, at most; 0: no limit", low=0, high=1e6)
    workers: int = knob(8, "requests under way at a time", low=1, high=1000)
    price_in: float = knob(0.0, "price of a million prompt tokens", low=0, high=1e9)
    price_out: float = knob(0.0, "price of a million answer tokens", low=0, high=1e9)
    logprobs: bool = knob(False, "ask for log-probabilities, from which verdict probabilities are read")
    body: dict[str, Any] = knob({}, "more fields of each request; a null takes a field away, as in {max_tokens: null}")


def open_endpoint(url: str, model: str | None, limits: dict[str, Any]) -> "Endpoint":
    """The endpoint that a step's settings name.

    Raises UserError for no model, an address that is none, a missing key, a secret among the settings, a body that is no JSON,
    and where the package openai is not installed.
    """
    found: Limits = build(Limits, limits, "endpoint")
    host = check_address(url)
    if not model:
        raise UserError("no model was named", f"{url} may serve several", "give --model NAME")
    if 0 < found.rate < 0.01:
        raise UserError(f"endpoint.rate={found.rate} is out of range", "it must be 0, or at least 0.01")
    if not {"model", "messages"}.isdisjoint(found.body):
        raise UserError("endpoint.body names the model or the messages", "they are what is asked", "name the model by --model")
    key = read_key(found.key, host)
    check_settings(found.body, url, model, key)
    try:
        json.dumps(found.body, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            "endpoint.body is no JSON", str(error).split("\n")[0][:100], "write texts, finite numbers, lists and mappings"
        ) from None
    try:
        import openai  # noqa: F401
    except ImportError:
        how = "install it: pip install 'modelwright[endpoint]'"
        raise UserError("the package openai is not installed", "an endpoint is asked through it", how) from None
    return Endpoint(url, model, found, key)


class Endpoint:
    """Answers come as they are ready. `name` is the address and the model, and never the key."""

    def __init__(self, url: str, model: str, limits: Limits, key: str = ""):
        self.url, self.model, self.limits, self._key = url.rstrip("/"), model, limits, key
        self.name = f"{model} at {url}" + (f" with {json.dumps(limits.body, sort_keys=True)}" if limits.body else "")
        self._secrets = Secrets(key)
        self._next = 0.0  # when the rate allows the next request
        self._reached, self._answered, self._refused = False, False, 0

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        session = _Session(self, prompts)
        session.start()
        try:
            for _ in prompts:
                yield session.next()
        finally:
            session.stop()

    def client(self) -> "AsyncOpenAI":
        """A client that waits, fails and repeats as the limits say. Belongs to the event loop that it is made in."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(api_key=self._key or "none", base_url=self.url, timeout=self.limits.timeout, max_retries=0)

    async def answer(self, client: "AsyncOpenAI", prompt: Prompt) -> Answer:
        """The answer to one prompt, or what became of it. Raises UserError where no further request can succeed."""
        troubles: list[str] = []
        bound = self.limits.backoff
        while True:
            try:
                await self._pace()
                answer = await self._post(client, prompt)
            except Failure as failure:
                troubles.append(failure.kind)
                if not failure.again or len(troubles) > self.limits.retries:
                    if self._hopeless(failure):
                        raise self._sentence(failure) from None
                    return Answer(status=failure.kind, troubles=tuple(troubles), said=self._clean(failure.said))
                await asyncio.sleep(failure.wait or random.uniform(0, bound))  # noqa: S311 - jitter
                bound = min(60.0, 2 * bound)
            else:
                self._answered = True
                return replace(answer, text=self._secrets.mask(answer.text), troubles=(*troubles, *answer.troubles))

    async def _pace(self) -> None:
        """Wait for this request's place in the rate."""
        if not self.limits.rate:
            return
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + 60 / self.limits.rate
        await asyncio.sleep(at - now)

    async def _post(self, client: "AsyncOpenAI", prompt: Prompt) -> Answer:
        import httpx2  # the HTTP library of the openai package
        from openai import APIConnectionError, APIStatusError, APITimeoutError, Omit

        options: Any = {"follow_redirects": False}
        if not self._key:
            options["headers"] = {"Authorization": Omit()}
        try:  # the raw response: what is in it is read with care below, and the package's own models cost more than the request
            reply = await client.post("/chat/completions", cast_to=httpx2.Response, body=self._body(prompt), options=options)
        except APITimeoutError as error:
            raise Failure("timeout", str(error)) from None
        except APIConnectionError as error:
            raise Failure("connection", str(error.__cause__ or error)) from None
        except APIStatusError as error:
            self._reached = True
            said = error.response.text or error.response.reason_phrase
            raise failure_of(error.status_code, said, error.response.headers.get("Retry-After")) from None
        self._reached = True
        return read_reply(reply.content, prompt, self.limits.price_in, self.limits.price_out)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": plain_text(text)} for role, text in prompt.messages],
            "max_tokens": prompt.max_tokens or 16,  # an endpoint gives probabilities of what it writes
            "temperature": prompt.temperature,
        }
        if prompt.options and self.limits.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        return {name: value for name, value in (body | self.limits.body).items() if value is not None}

    def _hopeless(self, failure: Failure) -> bool:
        if failure.kind == "refused":
            self._refused += 1
        refused_from_the_start = not self._answered and self._refused >= 3
        return not self._reached or failure.kind in HOPELESS or refused_from_the_start

    def _clean(self, said: str) -> str:
        """What a failure says, in one line of readable length. Masked before it is cut, so that no part of a key is left."""
        line = " ".join(plain_text(said).split())
        return self._secrets.mask(self._secrets.mask(line)[:200])

    def _sentence(self, failure: Failure) -> UserError:
        if not self._reached:
            return UserError(f"no endpoint answers at {self.url}", self._clean(failure.said), "check the address, or start the server")
        what = f"{self.url} refuses the requests" + (f" with {failure.kind}" if failure.kind in HOPELESS else "")
        return UserError(what, self._clean(failure.said), HOPELESS.get(failure.kind, "check the model and endpoint.body"))


class _Session:
    """One list of prompts under way: an event loop in its own thread, whose answers are handed over as they come."""

    def __init__(self, endpoint: Endpoint, prompts: Sequence[Prompt]):
        self.endpoint, self.prompts, self.left = endpoint, prompts, len(prompts)
        self._ready: SimpleQueue[tuple[int, Answer] | BaseException] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._work = self._loop.create_task(self._ask_all())
        self._thread = threading.Thread(target=self._run, name="modelwright endpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def next(self) -> tuple[int, Answer]:
        """The next answer, or whatever ended the session."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        self.left -= 1
        return ready

    def stop(self) -> None:
        """Give up what is under way, and wait until the connections are closed."""
        if self.left:
            with suppress(RuntimeError):  # the loop may have ended by itself
                self._loop.call_soon_threadsafe(self._work.cancel)
        self._thread.join()

    def _run(self) -> None:
        ended: BaseException | None = None
        try:
            self._loop.run_until_complete(self._work)
        except BaseException as error:  # whoever waits must hear of it
            ended = error
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        if ended:
            self._ready.put(ended)

    async def _ask_all(self) -> None:
        todo = iter(enumerate(self.prompts))
        async with self.endpoint.client() as client:

            async def work() -> None:
                for i, prompt in todo:
                    self._ready.put((i, await self.endpoint.answer(client, prompt)))

            workers = [asyncio.create_task(work()) for _ in range(min(self.endpoint.limits.workers, len(self.prompts)))]
            try:
                await asyncio.gather(*workers)
            finally:  # one that failed for good ends the others
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
