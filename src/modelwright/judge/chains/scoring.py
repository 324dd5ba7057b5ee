"""What AoR and its judges say to each other: requests to score chains, and the scores that come back."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """Chains to be scored in one go: of one answer (local), or one of each answer (`compare`). `examples` are scored chains."""

    question: str
    chains: tuple[str, ...]
    compare: bool = False
    examples: tuple[tuple[str, float], ...] = ()
    round: int = 0


Scores = list[float] | None  # one per chain, or None: not to be had
Scorer = Callable[[list[Request]], list[Scores]]
