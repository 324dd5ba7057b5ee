"""Full fine-tuning: every weight moves. The baseline that each training-time method is measured against."""

from dataclasses import dataclass

from modelwright.core.knobs import Data, Train, knob
from modelwright.core.training import Technique


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "what to learn from")
    evals: dict[str, Data] = knob({}, "held-out texts by name; empty: a share of the data is held out")
    holdout: float = knob(0.05, "share of the rows held out when no evals are given", low=0, high=0.5)
    train: Train = knob(Train(), "how long and how fast")


class Full(Technique):
    """Plain training."""

    name = "full"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
