"""Balance for any stock mixture of experts while it trains: losses that are right per layer, or a bias without a loss.

What for: continued training of experts, where load drifts. transformers' own loss pools the layers before the product and
counts only the micro-batch at hand (see modelwright.moe.balance for the definitions, conventions and sources).

- switch: E sum f P of each layer, mean over layers; f over the micro-batch of this process. P is of the scores that the
  router has: a softmax, or DeepSeek-V3's sigmoid over its sum for routers with a bias of the selection.
- global: the same with f over every micro-batch and process of an optimizer step (2501.11873). The counts of a step are
  only known at its end, so f is the running one: all micro-batches of the step so far. One micro-batch a step is exact.
- sequence: inside each sequence (DeepSeek-V3, 1e-4).   - z: squared logsumexp (ST-MoE, 1e-3).
- cv: squared coefficient of variation of the importance (Shazeer, 1e-2).
- bias: no loss. Each expert's bias of the selection moves by `rate` against its load after each step (2408.15664). Only for
  models with such a bias (GLM-4-MoE, dots): transformers ships the buffer and no updater.

Load, MaxVio, entropy, dead experts and pictures are in the facts. Recomputed passes count once.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.technique import LossTerm, Named, Technique
from modelwright.moe import balance
from modelwright.moe.watch import routers


@dataclass(frozen=True)
class Knobs(Tune):
    kind: Literal["switch", "global", "sequence", "z", "cv", "bias"] = knob("global", "which loss, or the bias without one")
    coefficient: float = knob(0.01, "of the loss; its mean over layers is taken", low=0, high=1000)
    convention: Literal["switch", "hf"] = knob("switch", "switch and global: 1 at uniform, or transformers' top_k times that")
    rate: float = knob(1e-3, "bias: u, the step of the bias", low=0)
    centred: bool = knob(True, "bias: keep its mean at 0")


def _biased(router: Any) -> bool:
    """Whether a router has DeepSeek-V3's bias of the selection, and so its sigmoid scores."""
    return getattr(router, "e_score_correction_bias", None) is not None


class Loss(LossTerm):
    """The mean over layers of one loss, times the real tokens, so that micro-batches weigh by their tokens."""

    name = "balance"

    def __init__(self, owner: "Balance"):
        self.owner, self.weight = owner, owner.knobs.coefficient

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["real"].sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        o = self.owner
        each = [o.loss(layer, logits, index, batch["real"]) for layer, (logits, index) in sorted(o.heard.items())]
        o.heard.clear()
        return torch.stack(each).mean()[None] * batch["real"].sum()


class Balance(Technique):
    """Hears the routers and adds a loss, or moves their bias."""

    name = "balance"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        if not anatomy.experts:
            raise UserError(f"balance: {type(anatomy.model).__name__} has no experts", how="give a mixture of experts")
        self.model, found = model, [r for _, r in routers(model)]
        if self.knobs.kind == "bias" and not all(_biased(r) for r in found):
            raise UserError(
                f"{type(anatomy.model).__name__} has no bias to balance with",
                "its routers select by their scores alone",
                "set kind: global, or give a GLM-4-MoE or dots style model",
            )
        self.experts = anatomy.experts
        self.step = balance.GlobalCounts(len(found), self.experts)
        self.total = torch.zeros(len(found), self.experts, dtype=torch.long)
        self.routers = found

    def _hear(self, layer: int) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            if not self.model.training or balance.recomputing():
                return
            logits, index = output[0], output[2]
            self.step.add(layer, balance.counts_of(index, self.experts, self.real.flatten()))
            self.heard[layer] = logits, index

        return hook

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        self.real = batch["real"]
        self.heard.clear()

    def terms(self) -> list[LossTerm]:
        # The hooks come last: what is probed, or copied before it is sharded, is the stock model.
        self._handles: list[Any] = [r.register_forward_hook(self._hear(i)) for i, r in enumerate(self.routers)]
        return [] if self.knobs.kind == "bias" else [Loss(self)]

    def loss(self, layer: int, logits: Tensor, index: Tensor, real: Tensor) -> Tensor:
        """One layer's loss of one micro-batch; logits (B T, E), index (B T, k), real (B, T)."""
        k, flat = self.knobs.kind, real.flatten()
        if k == "z":
            return balance.z(logits.float(), flat)
        probs = logits.float().softmax(-1)
        if _biased(self.routers[layer]):
            probs = logits.float().sigmoid()
            probs = probs / probs.sum(1, keepdim=True)
        if k == "sequence":
            return balance.per_sequence(probs.view(*real.shape, -1), index.view(*real.shape, -1), real)
        if k == "cv":
            weights = torch.zeros_like(probs).scatter(1, index, probs.gather(1, index))
            return balance.cv_squared((weights * flat[:, None]).sum(0))
        here = balance.counts_of(index, self.experts, flat)
        counts = here if k == "switch" else dist.all_sum(self.step.counts[layer].clone()).to(here.device)
        return balance.switch(probs, counts, real=flat, k=index.shape[1], convention=self.knobs.convention)

    def after_step(self, named: Named) -> None:
        counts = self.step.summed()
        if self.knobs.kind == "bias":
            with torch.no_grad():
                for router, c in zip(self.routers, counts, strict=True):
                    bias: Any = router.e_score_correction_bias  # asked for each time: DDP puts another tensor there
                    bias.copy_(balance.nudge(bias, c.to(bias.device), self.knobs.rate, self.knobs.centred))
        self.total += counts.to(self.total.device)
        self.step.reset()

    def liveness(self, moved: dict[str, Tensor]) -> str:
        if not self.total.any():
            raise RuntimeError("balance: no router was heard")
        return f"{super().liveness(moved)}; MaxVio {balance.facts(self.total)['MaxVio']:.2f} in the first step"

    def facts(self) -> dict[str, Any]:
        for h in self._handles:
            h.remove()
        return balance.facts(self.total)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


METHOD = Balance
