"""What an endpoint says: its answer, the probabilities in it, the tokens that it counted, or how it failed.

Everything in a reply is somebody else's: a field of another type, a number past all range and half a surrogate pair are read as
what they are, and end no run.
"""

import email.utils
import json
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from modelwright.core.ask.protocol import Answer, Prompt

HOPELESS = {"401": "check the key", "403": "check the key", "404": "check the address and the model's name"}
_KINDS = {401: "401", 403: "403", 404: "404", 408: "timeout", 429: "rate limit"}
_REPEATED = ("timeout", "rate limit", "server error")  # kinds of refusal that a repetition may mend
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_TOKENS = 10**12


class Failure(Exception):
    """A request that failed: its kind, what was said, the seconds to wait, and whether a repetition could help."""

    def __init__(self, kind: str, said: str = "", wait: float = 0.0, again: bool = True):
        super().__init__(said)
        self.kind, self.said, self.wait, self.again = kind, said, wait, again


def failure_of(status: int, said: str, retry_after: str | None) -> Failure:
    """The failure behind an HTTP status."""
    kind = _KINDS.get(status)
    if kind is None:
        kind = "server error" if status >= 500 else "refused"
    return Failure(kind, said, seconds(retry_after), kind in _REPEATED)


def seconds(value: str | None) -> float:
    """Retry-After: seconds or a date; 0 when it says neither. At most ten minutes."""
    try:
        wait = float(value or 0)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(600.0, max(0.0, wait)) if math.isfinite(wait) else 0.0


def read_reply(said: bytes, prompt: Prompt, price_in: float, price_out: float) -> Answer:
    """The answer in a reply; prices are per million tokens. Raises Failure where there is none."""
    try:
        reply = json.loads(said)
    except (ValueError, RecursionError):
        raise Failure("not JSON") from None
    try:
        choice = reply["choices"][0]
        text = plain_text(choice["message"]["content"] or "").strip()
        logprobs, end = choice.get("logprobs"), choice.get("finish_reason")
        usage = reply.get("usage") or {}
        counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (TypeError, LookupError, AttributeError):
        raise Failure("no answer in it") from None
    if end == "length":
        status = "cut"
    else:
        status = "ok" if text else "empty"
    troubles = ("usage not readable",) if None in counts else ()
    tokens_in, tokens_out = (n or 0 for n in counts)
    cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return Answer(text, status, weigh(logprobs, prompt.options), tokens_in, tokens_out, cost, troubles)


def plain_text(text: Any) -> str:
    """A text without halves of surrogate pairs, which no file can hold. Raises TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError("no text")
    return _SURROGATE.sub("\ufffd", text)


def _count(value: Any) -> int | None:
    """A number of tokens; 0 where none is given, None for what is no such number."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value)


def weigh(logprobs: Any, options: Sequence[str]) -> tuple[float, ...] | None:
    """Probabilities of the options, where the answer gets as far as what they have in common; None where it does not say."""
    if not options:
        return None
    common = os.path.commonprefix(list(options))
    tails = [option[len(common) :] for option in options]
    said = ""
    try:
        for token in logprobs["content"]:
            if said.strip() == common.strip():
                return _shares(token["top_logprobs"], tails, at_start=not common)
            said += token["token"]
    except (TypeError, LookupError, ValueError, AttributeError, ZeroDivisionError):
        pass
    return None


def _shares(candidates: list[dict[str, Any]], tails: list[str], at_start: bool) -> tuple[float, ...]:
    """How the candidates for the next token share themselves among the tails; one that fits several counts for none."""
    mass = [0.0] * len(tails)
    for candidate in candidates:
        word = candidate["token"].lstrip() if at_start else candidate["token"]
        fits = [i for i, tail in enumerate(tails) if word and (tail.startswith(word) or word.startswith(tail))]
        if len(fits) == 1:
            mass[fits[0]] += math.exp(_logprob(candidate["logprob"]))
    return tuple(m / sum(mass) for m in mass)


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not value <= 0.01:  # rounding may lift it above 0, NaN is not below
        raise ValueError("no log-probability")
    return float(value)
