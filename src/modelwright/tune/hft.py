"""Half Fine-Tuning: freeze a random half of the matrices in each round, tune the rest (HFT, arXiv 2404.18466, ACL 2025).

theta = (updated, frozen):  updated <- updated - eta grad L,  frozen <- frozen.  Per block 2 of {q, k, v, o} are frozen,
2 of {gate, up, down} in a random half of the blocks and 1 of 3 in the others, one of the two norms; embeddings, head and
final norm always move. The draw is made once per round (SFT, then DPO; or each task of a sequence) and anew for the next.

No official code was found; two independent descriptions agree on the above. Ours: biases follow their matrix; a fused
tensor is frozen by rows; stacked experts share one draw; the router moves; the round counts the tuning steps in the
checkpoint's lineage; balance=params evens out the parameter count where key and value heads are few (GQA).
"""

from dataclasses import dataclass
from typing import Any, Literal

from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.freeze import Freezing, halves
from modelwright.core.train.technique import Technique


@dataclass(frozen=True)
class Knobs(Tune):
    granularity: Literal["category", "layer", "model"] = knob("category", "half of what: each kind of matrix, the blocks, or all matrices")
    balance: Literal["count", "params"] = knob("count", "halve the number of matrices, or choose among halves by parameters")
    round: int | None = knob(None, "number of the draw; empty: the tuning steps that the model has been through", low=0)


class Hft(Freezing):
    """A static selector: survives every wrapper, and the optimizer holds state for the chosen half only."""

    name = "hft"
    supports = Technique.supports - {"lora"}

    def __init__(self, knobs: Knobs):
        super().__init__()
        self.knobs = knobs

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        turn = self.round if self.knobs.round is None else self.knobs.round
        self.freeze(model, anatomy, halves(anatomy, 1000 * turn + seed, self.knobs.granularity, self.knobs.balance))
        self._fraction = self.fraction(anatomy)

    def facts(self) -> dict[str, Any]:
        return {"trainable share of the blocks": self._fraction, "frozen tensors": len(self.frozen)}


METHOD = Hft
