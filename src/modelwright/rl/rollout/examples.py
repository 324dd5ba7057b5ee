"""Small rewards to try PPO with. They say nothing about quality."""

from typing import Any


def letters(completions: list[Any]) -> list[float]:
    """The share of a response's characters that are letters; of responses that are token ids, the share of even ones."""
    return [_share([c.isalpha() for c in r] if isinstance(r, str) else [i % 2 == 0 for i in r]) for r in completions]


def length(completion_ids: list[list[int]]) -> list[float]:
    """Tokens of a response, in hundreds: the bias that many reward models have."""
    return [len(ids) / 100 for ids in completion_ids]


def _share(of: list[bool]) -> float:
    return sum(of) / max(1, len(of))
