"""Full fine-tuning: every weight moves. The baseline that each training-time method is measured against."""

from dataclasses import dataclass

from modelwright.core.knobs import Tune
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    """Nothing beyond what every way to tune asks for."""


class Full(Technique):
    """Plain training."""

    name = "full"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs


METHOD = Full
