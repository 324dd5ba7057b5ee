"""GW-MoE (2406.12375): while training, tokens with an undecided router are sent to all experts; evaluation is unchanged.

What for: fine-tuning an existing mixture of experts. Where the router's scores are near uniform, the choice among experts is
arbitrary; broadcasting lets every expert learn to serve these tokens. The result is a stock model.

The rule, what the official code does instead of it, and what is ours: modelwright.moe.uncertain. The published scripts use
H* = 1.6 (GLUE) and 1.8 (summaries, questions) for 8 experts, whose largest entropy is ln 8 = 2.08. Ours: the default is 1.5
nats at 8 experts and the same share of ln E at any other number, as 4 experts can never reach 1.5 nats. A threshold that no
token can reach is refused. Routers whose scores are no softmax (GLM-4-MoE) are refused at the first pass: the rule has no
probabilities to send a token with.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.moe.routing import CHOSEN, Routing
from modelwright.moe.uncertain import broadcast, entropy, uncertain
from modelwright.tune.rerouting.technique import Rerouted

DEFAULT = 1.5 / math.log(8)  # of ln E


@dataclass(frozen=True)
class Knobs(Tune):
    threshold: float | None = knob(
        None, "H*: entropy from which a token is broadcast, in the unit below; empty: 0.72 ln E, 1.5 nats at 8 experts", low=0
    )
    unit: Literal["nats", "normalised", "share"] = knob("nats", "nats, share of ln E, or share of the tokens that is broadcast")
    limit: int | None = knob(None, "at most so many tokens per sequence, in order of position; empty: no limit", low=1)
    mode: Literal["broadcast", "released"] = knob("broadcast", "the paper's rule, or what the official code computes")
    match_scale: bool = knob(False, "give the broadcast the sum of the weights that were chosen")


class GwMoe(Rerouted):
    """Broadcasts uncertain tokens during training."""

    name = "gw_moe"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        if knobs.unit != "nats" and (knobs.threshold is None or knobs.threshold > 1):
            why = "the default is in nats" if knobs.threshold is None else f"threshold={knobs.threshold} is no share"
            raise UserError(f"gw_moe: unit={knobs.unit} needs a threshold from 0 to 1", why, "give one")
        self.threshold = knobs.threshold or 0.0  # a default is known with the model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        super().select(model, anatomy, seed)
        E, k = anatomy.experts, self.knobs
        self.threshold = DEFAULT * math.log(E) if k.threshold is None else k.threshold
        highest = float(entropy(torch.full((1, E), 1 / E)))  # of a token whose experts are all alike
        nats = self.threshold * math.log(E) if k.unit == "normalised" else self.threshold
        if k.unit != "share" and nats > highest:
            raise UserError(
                f"gw_moe: threshold={k.threshold} {k.unit} is never reached",
                f"with {E} experts the entropy is at most {highest:.5f} nats, so no token would be broadcast",
                f"give less, or leave it out for {DEFAULT * math.log(E):.2f} nats",
            )

    def change(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        k = self.knobs
        where = uncertain(logits.float().softmax(-1), self.threshold, k.unit, k.limit, real, self.hooks.shape[1])
        return broadcast(logits, weights, index, where, mode=k.mode, match_scale=k.match_scale, real=real)

    def share(self) -> float:
        """Share of the tokens of all layers that were uncertain so far: those that the chosen experts did not serve."""
        return 1 - int(self.routed[CHOSEN]) / max(self.tokens * self.top_k, 1)

    def liveness(self, moved: dict[str, Tensor]) -> str:
        share = self.share()
        said = f"{share:.1%} of the tokens were uncertain" if share else "NO token was uncertain, so this step was plain training"
        return f"{super().liveness(moved)}; {said}"

    def facts(self) -> dict[str, Any]:
        return {
            "share of uncertain tokens": self.share(),
            "threshold": self.threshold,
            "unit": self.knobs.unit,
            "mode": self.knobs.mode,
        }


METHOD = GwMoe
