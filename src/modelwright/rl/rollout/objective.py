"""The losses of PPO, and how the loop is given roll-outs where it hands over prompts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE
from modelwright.core.train.objective import NextToken, Outputs
from modelwright.core.train.technique import LossTerm
from modelwright.rl.rollout.experience import logp_of


@dataclass
class PpoOutputs(Outputs):
    """And the value losses, (B, T-1), with a gradient."""

    value_losses: Tensor | None = None


class ValueLoss(LossTerm):
    """Mean over the responses' tokens."""

    name = "value"

    def __init__(self, weight: float):
        self.weight = weight  # type: ignore[misc]

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return (outputs.value_losses * self.weights(batch)).sum(1)


def policy_losses(logp: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A ratio, -A clip(ratio)) of each token, (B, T-1)."""
    ratio = (logp - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((v - R)^2, (clipped v - R)^2) of each token, (B, T-1)."""
    near = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


class PpoObjective(NextToken):
    """Roll-outs in the place of the prompts that the loop hands over, and PPO's losses of them."""

    name, unit = "ppo", "KL divergence from the reference, nats per token"

    def __init__(self, model: Any, tokenizer: Any, seed: int, technique: Any):
        super().__init__(model, tokenizer, seed)
        self.technique = technique
        self._window = (-1, 0)  # step, passes of it so far

    def install(self, model: Any) -> None:
        self.technique.begin(model)

    def remove(self) -> None:
        self.technique.end()

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        at = self._window[1] + 1 if self._window[0] == step else 0
        self._window = (step, at)
        device = batch["input_ids"].device
        batch.clear()
        batch.update({k: v.to(device) for k, v in self.technique.minibatch(step, at).items()})

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        t, k = self.technique, self.technique.knobs
        if "old" not in batch:
            return t.evaluate(batch)
        ids, learnt = batch["input_ids"], batch["labels"][:, 1:] != IGNORE
        logp = logp_of(model(**self.inputs(batch)).logits, ids)
        losses = policy_losses(torch.where(learnt, logp, batch["old"]), batch["old"], batch["advantages"], k.clip)
        values = t.critic(ids, batch["attention_mask"], t.states())[:, :-1]
        of_values = value_losses(torch.where(learnt, values, batch["values"]), batch["values"], batch["returns"], k.value_clip)
        far = ((logp - batch["old"]).exp() - 1).abs() > k.clip
        t.note(torch.stack([(far & learnt).sum(), (of_values.detach() * learnt).sum(), learnt.sum()]))
        return PpoOutputs(losses.detach(), (losses * weights).sum(), value_losses=of_values)

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        return {k: (float(batch[k].sum()), len(batch[k])) for k in ("reward", "response tokens")}


def as_batch(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of roll-outs as the loop wants a batch, as wide as its longest row."""
    longest = int(rows["length"].max())
    ids, at = rows["input_ids"][:, :longest], torch.arange(longest)
    real = at < rows["length"][:, None]
    batch = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": torch.where(real & (at >= rows["begin"][:, None]), ids, IGNORE),
        "real": real,
        "old": rows["logp"][:, : longest - 1],
    }
    batch |= {k: rows[k][:, : longest - 1] for k in ("values", "advantages", "returns", "reference")}
    return batch | {"example_id": rows.get("example_id", torch.arange(len(ids)))}
