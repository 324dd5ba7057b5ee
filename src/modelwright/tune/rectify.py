"""Rectify-Router (2402.12399): training a mixture of experts under a capacity, with dropped tokens and empty slots put to use.

What for: a model that will be served with fixed slots per expert. The equations, the options, and what is wrong in the
official code: modelwright.moe.rectify. Training and evaluation are under the capacity; the result is a stock model, and
modelwright.moe.reroute puts the same routing under it again. Published setting: factor 1.0, lr 1e-5 to 1e-6, cosine.

fill_in and intra off is the plain capacity-limited router, the baseline. Weights are the softmax over all experts,
renormalised over the kept ones, so a model that does otherwise even without a limit is refused at its first pass: one
without norm_topk_prob (OLMoE, Qwen2-MoE), with sigmoid scores or a bias of the selection (GLM-4-MoE), RMoE with a residual.

Over several processes each is one rank, as in the paper: slots are counted over all processes' tokens, in evaluation too,
and intra prefers the experts of the process's own share, E / processes of them. Ours: each process still holds all experts
(DDP, or FSDP2's shards), so nothing travels but the scores; the outcome is that of expert parallelism, and of one process
with as many simulated ranks, to the rounding. Where the experts themselves lie apart: modelwright.moe.parallel.
Padding takes no slot, but for that of packed rows in evaluation, which no mask tells.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.moe.parallel import rectify_over
from modelwright.moe.rectify import rectify
from modelwright.moe.routing import FILLED, LOCAL, Routing
from modelwright.tune.rerouting.technique import Rerouted


@dataclass(frozen=True)
class Knobs(Tune):
    factor: float = knob(1.0, "capacity factor: slots per expert over k tokens / experts", low=0.01)
    fill_in: bool = knob(True, "fill empty slots with tokens' next choice")
    intra: bool = knob(True, "send dropped tokens to the best expert of their own rank")
    unrouted: Literal["auto", "all", "any", "ignore_last"] = knob("auto", "which tokens intra rectifies")
    fill_order: Literal["paper", "code"] = knob("paper", "order of fill-ins: by their own score, or by the token's largest")
    ranks: int = knob(1, "simulated ranks: equal shares of experts and tokens; several processes are ranks themselves", low=1)


class Rectify(Rerouted):
    """Capacity-limited routing with both rectifications."""

    name = "rectify"
    evaluates = True
    renormalises = True

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        super().select(model, anatomy, seed)
        if dist.world() > 1 and self.knobs.ranks not in (1, dist.world()):
            raise UserError(
                f"rectify: ranks={self.knobs.ranks} but {dist.world()} processes train", "each process is a rank", "leave ranks out"
            )

    def change(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing:
        c = self.knobs
        options: dict[str, Any] = {
            "factor": c.factor,
            "fill_in": c.fill_in,
            "intra": c.intra,
            "unrouted": None if c.unrouted == "auto" else c.unrouted,
            "fill_order": c.fill_order,
            "real": real,
        }
        return rectify_over(logits, self.top_k, **options) if dist.world() > 1 else rectify(logits, self.top_k, ranks=c.ranks, **options)

    def _shares(self) -> dict[str, float]:
        asked = self.tokens * self.top_k
        chosen, filled, local = (int(self.routed[i]) for i in (0, FILLED, LOCAL))
        return {"dropped": 1 - chosen / max(asked, 1), "filled in": filled / max(asked, 1), "rectified tokens": local / max(self.tokens, 1)}

    def liveness(self, moved: dict[str, Tensor]) -> str:
        return f"{super().liveness(moved)}; " + ", ".join(f"{v:.1%} {n}" for n, v in self._shares().items())

    def facts(self) -> dict[str, Any]:
        self.hooks.undo()  # the first process goes on alone, and its model must ask no other
        return self._shares()


METHOD = Rectify
