"""The judge protocol: prompts in, answers out, from a local model, an endpoint or a file of recorded answers.

A judge yields (index, answer) as answers come, in any order, so that each is on disk before the next is waited for.
Nothing is lost: a request that fails for good is an answer too, with the kind of its failure for a status.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

ANSWERED = ("ok", "cut", "empty")  # cut: at max_tokens. Any other status is the kind of a failure.


@dataclass(frozen=True)
class Prompt:
    """One request. `options` are texts to choose among: their probabilities as the next words are wanted too, or alone where
    `max_tokens` is 0. `attempt` tells apart requests that are the same in all else, where the judge samples."""

    messages: tuple[tuple[str, str], ...]  # (role, text); roles: system, user, assistant
    max_tokens: int = 50
    temperature: float = 0.0
    options: tuple[str, ...] = ()
    attempt: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. `probabilities` are those of the prompt's options, summing to one; `troubles` the failures on the way."""

    text: str = ""
    status: str = "ok"
    probabilities: tuple[float, ...] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    troubles: tuple[str, ...] = ()
    reused: bool = False
    said: str = ""  # by a failure

    @property
    def failed(self) -> bool:
        return self.status not in ANSWERED


class Judge(Protocol):
    """Anything that answers prompts. `name` says what it is, to the last weight: it is part of what answers are kept under."""

    name: str

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]: ...
