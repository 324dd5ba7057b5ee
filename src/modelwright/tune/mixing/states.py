"""The objective of SFTMix: next tokens, and the mixed states of two examples, through a head that never holds all logits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE
from modelwright.core.errors import UserError
from modelwright.core.train.head import ChunkedHead
from modelwright.core.train.objective import NextToken, Outputs
from modelwright.core.train.technique import LossTerm


@dataclass
class MixedOutputs(Outputs):
    """mixed: the sum of the mixed tokens' losses, with a gradient."""

    mixed: Tensor | None = None


class MixTerm(LossTerm):
    """Mean loss of the mixed tokens, over window and processes."""

    name = "mix"

    def __init__(self, mu: float):
        self.weight = mu

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(batch["mix_c"].numel() if "mix_c" in batch else 0)

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return outputs.total.new_zeros(1) if outputs.mixed is None else outputs.mixed[None]  # a batch may be all padding


class MixHead(ChunkedHead):
    """The chunked head, which gives the loss of the mixed states too."""

    def _reached(self, inputs: dict[str, Any]) -> Any:
        self._output = super()._reached(inputs)
        return self._output

    def _forward(self, *args: Any, loss_of: Any = None, **inputs: Any) -> Any:
        if not isinstance(loss_of, tuple):
            return super()._forward(*args, loss_of=loss_of, **inputs)
        labels, weights, states_of, mix = loss_of
        states: list[Tensor] = []

        def kept(hidden: Tensor) -> Tensor:
            states.append(states_of(hidden))
            return states[0]

        losses, total = super()._forward(*args, loss_of=(labels, weights, kept), **inputs)
        mixed = None if mix is None else self._mixed(states[0].flatten(0, 1), labels.flatten(), *mix)
        self._output = None
        return losses, total, mixed

    def _mixed(self, states: Tensor, labels: Tensor, c: Tensor, u: Tensor, lam: Tensor) -> Tensor:
        """Summed loss of the tokens that mix the states (N, d) at c with those at u, c in the share lam; all (M,)."""
        if not len(c):
            return 0 * states.sum().float()
        output = self._output
        z = (lam[:, None] * states[c].float() + (1 - lam[:, None]) * states[u].float()).to(states.dtype)  # (M, d)

        def loss(part: Tensor, at: Tensor) -> Tensor:
            g = self.logits(output, part).float()  # (m, V)
            both = (g.gather(1, labels[w[at]][:, None])[:, 0] for w in (c, u))
            return g.logsumexp(1) - lam[at] * next(both) - (1 - lam[at]) * next(both)

        return self.weighted(loss, z, torch.arange(len(c), device=z.device), torch.ones(len(c)))[0]


class Mixing(NextToken):
    """Next tokens, and in training the mixed states of the pairs of a batch."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, alpha: float, mixes: bool, ntp: bool):
        super().__init__(model, tokenizer, seed)
        self.alpha, self.mixes, self.ntp = alpha, mixes, ntp

    def install(self, model: Any) -> None:
        if self.whole_logits:
            raise UserError(
                "sftmix does not combine with a method that reads all logits", "it mixes states before the head", "leave it out"
            )
        self.head = MixHead.install(model)
        if self.head is None:
            raise UserError(f"sftmix cannot mix the states of {type(model).__name__}", "its head cannot be called alone", "use tune.full")

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The sequences of all pairs, with the places of the targets that are mixed: flat in (B, T-1), and the pair of each."""
        if not any("other" in r or "pairs" in r for r in rows):
            return super().collate(rows)
        flat: list[dict[str, Any]] = []
        couples = []  # two sequences, or the number of pairs in one
        for r in rows:
            flat.append(r)
            if r.get("other") is not None:
                flat.append(r["other"])
                couples.append((len(flat) - 2, len(flat) - 1))
        batch = super().collate(flat)
        found = self._within(batch, rows) if "segments" in batch else self._between(batch, couples)
        c, u, which, ids = found
        return batch | {"mix_c": c, "mix_u": u, "mix_pair": which, "mix_ids": ids, "mix_lam": torch.ones(len(c))}

    def _between(self, batch: dict[str, Tensor], couples: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        learnt, wide = batch["labels"][:, 1:] != IGNORE, batch["labels"].shape[1] - 1
        both = [(a * wide + learnt[a].nonzero()[:, 0], b * wide + learnt[b].nonzero()[:, 0]) for a, b in couples]
        ids = [[int(batch["example_id"][a]), int(batch["example_id"][b])] for a, b in couples]
        return _cut(both, ids)

    def _within(self, batch: dict[str, Tensor], rows: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        targets, segments = batch["labels"][:, 1:] != IGNORE, batch["segments"][:, 1:]
        wide, both, ids = segments.shape[1], [], []
        for i, r in enumerate(rows):
            order = segments[i].unique_consecutive().tolist()
            for a, b in zip(order[0 : 2 * r.get("pairs", 0) : 2], order[1 : 2 * r.get("pairs", 0) : 2], strict=True):
                both.append(tuple(i * wide + ((segments[i] == s) & targets[i]).nonzero()[:, 0] for s in (a, b)))
                ids.append([a, b])
        return _cut(both, ids)

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        """Draw lambda: by seed, step and pair alone, so that accumulation and processes do not change it."""
        if "mix_ids" in batch:
            draws = [np.random.default_rng((self.seed, step, int(a) + 1, int(b) + 1)) for a, b in batch["mix_ids"].tolist()]
            lam = torch.tensor([r.beta(self.alpha, self.alpha) for r in draws], dtype=torch.float32)
            batch["mix_lam"] = lam.to(batch["mix_pair"].device)[batch["mix_pair"]]

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> MixedOutputs:
        mix = (batch["mix_c"], batch["mix_u"], batch["mix_lam"]) if "mix_c" in batch and self.mixes else None
        losses, total, mixed = model(**self.inputs(batch), loss_of=(batch["labels"][:, 1:], weights, self.states, mix))
        if mix is not None and not self.ntp:
            total = total.detach() + 0 * total  # still reported
        return MixedOutputs(losses, total, None, mixed)


def _cut(both: list[Any], ids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of places, each cut to the shorter of the two; which pair each is of; the pairs' examples (P, 2)."""
    sizes = [min(len(a), len(b)) for a, b in both]
    empty = torch.zeros(0, dtype=torch.long)
    c, u = (torch.cat([empty, *(pair[k][:n] for pair, n in zip(both, sizes, strict=True))]) for k in (0, 1))
    which = torch.repeat_interleave(torch.arange(len(both)), torch.tensor(sizes, dtype=torch.long))
    return c, u, which, torch.tensor(ids, dtype=torch.long).view(-1, 2)
