"""Who answers what best, and a routing vector for each expert, trained inside the dense model of that expert (UpIT, 2410.01610).

`losses`: mean loss of each example's response under each expert. `buckets`: which expert an example belongs to. `train_vectors`: one
vector r per layer; the output of the feed-forward part is multiplied by sigmoid(r . h), h being its input, and

    loss = alpha * next-token loss  +  (1 - alpha) * mean over tokens and layers of  -log sigmoid(r . h)

The second term alone is content with one long vector for all experts. With negatives the tokens of other experts' examples are to give 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE, TokenRows, collate
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.objective import NextToken
from modelwright.moe.partition import balanced_assign
from modelwright.reshape.experts.routers import generator


@torch.no_grad()
def losses(model: Any, rows: TokenRows, which: list[int], batch: int) -> Tensor:
    """Mean loss of the targets of each row, nats (len(which),)."""
    objective = NextToken(model)
    objective.install(model.eval())
    found = []
    try:
        for at in range(0, len(which), batch):
            b = _batch(model, rows, which[at : at + batch])
            weights = (b["labels"][:, 1:] != IGNORE).float()
            found.append((objective.forward(model, b, weights).losses.sum(1) / weights.sum(1).clamp(min=1)).cpu())
    finally:
        objective.remove()
    return torch.cat(found)


def _batch(model: Any, rows: TokenRows, which: list[int]) -> dict[str, Tensor]:
    return {k: v.to(model.device) for k, v in collate([rows[i] for i in which]).items()}


def buckets(loss: Tensor, even: bool) -> Tensor:
    """The expert of each example (N,) from losses (N, experts): the lowest one, or the best assignment to buckets of one size."""
    if not even:
        return loss.argmin(1)
    n, e = loss.shape
    sizes = [n // e + (i < n % e) for i in range(e)]
    return torch.from_numpy(balanced_assign(loss.double().numpy(), sizes))


class Gates(nn.Module):
    """Routing vectors (layers, d) that scale the feed-forward parts of a dense model while `on` is open."""

    def __init__(self, anatomy: Anatomy, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(len(anatomy.blocks), width))
        self._modules_of = [b.feed_forward for b in anatomy.blocks]
        self.logits: list[Tensor] = []  # (B, T) of each layer, in the last pass

    @contextmanager
    def on(self) -> Iterator[None]:
        def scale(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor:
                logit = (args[0] if args else kwargs["hidden_states"]) @ self.vectors[layer]
                self.logits.append(logit)
                return out * torch.sigmoid(logit)[..., None]

            return hook

        handles = [m.register_forward_hook(scale(i), with_kwargs=True) for i, m in enumerate(self._modules_of)]
        try:
            yield
        finally:
            for h in handles:
                h.remove()


def train_vectors(
    model: Any, rows: TokenRows, own: list[int], others: list[int], *, alpha: float, epochs: int, lr: float, batch: int, key: tuple
) -> Tensor:
    """The routing vectors (layers, d) of the expert whose weights `model` holds. `others`: examples of the other experts, may be empty."""
    anatomy = Anatomy(model)
    gates = Gates(anatomy, anatomy.config.hidden_size).to(model.device)
    optimizer, g = torch.optim.Adam(gates.parameters(), lr), generator(*key)
    objective = NextToken(model)
    model.eval().requires_grad_(False)
    objective.install(model)
    try:
        with gates.on():
            for _ in range(epochs):
                order = [own[i] for i in torch.randperm(len(own), generator=g)]
                for at in range(0, len(order), batch):
                    loss = _loss(model, objective, gates, rows, order[at : at + batch], others, alpha, g)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    finally:
        objective.remove()
    return gates.vectors.detach().cpu()


def _loss(
    model: Any, objective: NextToken, gates: Gates, rows: TokenRows, own: list[int], others: list[int], alpha: float, g: torch.Generator
) -> Tensor:
    drawn = [others[int(i)] for i in torch.randint(len(others), (len(own),), generator=g)] if others else []
    b = _batch(model, rows, own + drawn)
    weights = (b["labels"][:, 1:] != IGNORE).float()
    weights[len(own) :] = 0  # another expert's words are not to be predicted
    gates.logits.clear()
    total = objective.forward(model, b, weights).total / weights.sum().clamp(min=1)
    logits = torch.stack([x[b["real"]] for x in gates.logits])  # (layers, tokens)
    ours = torch.arange(len(own) + len(drawn), device=logits.device)[:, None] < len(own)
    target = ours.expand_as(b["real"])[b["real"]].to(logits)
    return alpha * total + (1 - alpha) * F.binary_cross_entropy_with_logits(logits, target.expand_as(logits))
