"""Several ways to tune in one step: what they freeze, edit, add and weigh is put together.

Ours. `tune: [hft, c_rlft]` in a recipe is short for `tune.mix: {methods: [hft, c_rlft]}`; a method's own settings stand
under its name. Each method is attached, then each selects, then all edit the gradient in the order they are written:
    grad <- rule_n(... rule_1(grad)),    loss = sum over terms of weight * sum / count
Two methods that both make the rows, or one that does not work beside another, are refused with the reason.
"""

from dataclasses import dataclass
from typing import Any

from modelwright.core.knobs import Tune, knob


@dataclass(frozen=True)
class Knobs(Tune):
    methods: list[Any] = knob([], "ways to tune, in order: names, or a name with its own settings")


class Mix:
    """Holds the settings; the methods themselves are made from them."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs


METHOD = Mix
