"""The arithmetic of a funnel: what each stage takes of what the one before left, and what is left of all."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Documents into a stage and out of it."""

    name: str
    before: int
    after: int

    @property
    def removed(self) -> float:
        """Share of the documents that came in."""
        return 1 - self.after / self.before if self.before else 0.0


def left(removed: Sequence[float]) -> list[float]:
    """Share of the first stage's documents that is left after each stage."""
    shares, now = [], 1.0
    for r in removed:
        now *= 1 - r
        shares.append(now)
    return shares


def table(stages: Sequence[Stage]) -> list[dict[str, float | int | str]]:
    """One row per stage: documents before and after, removed share of the stage, left share of all.

    The left shares are the product of the stages', and equal the last count over the first: stages hand on all they keep.
    """
    for a, b in zip(stages, stages[1:], strict=False):
        if a.after != b.before:
            raise ValueError(f"{a.name} left {a.after} documents and {b.name} got {b.before}")
    shares = left([s.removed for s in stages])
    return [
        {"stage": s.name, "before": s.before, "after": s.after, "removed": round(s.removed, 6), "left": round(share, 6)}
        for s, share in zip(stages, shares, strict=True)
    ]
