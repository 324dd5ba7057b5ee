"""GW-MoE's rule (2406.12375): tokens whose router is undecided are sent to all experts.

    H_t = -sum_e p_te ln(p_te + 1e-5),   G = {t: H_t >= H*},   y_t = sum_e p_te E_e(x_t) for t in G, else as before

The paper's: broadcast with the whole softmax, gradients through every p. The official code does something else: inside its
loop over experts it assigns p_e * x, the input and not the expert's output, so an uncertain token ends as p_{E-1} * x_t and
passes by the experts. mode "released" does that. Its limit of -1 slots selects nothing; here empty means no limit.
Ours: H* as nats, as a share of ln E, or as the share of tokens to broadcast; match_scale, for models whose top-k weights do
not sum to 1: the broadcast gets the sum that the chosen weights had, so that training and evaluation see one scale.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from modelwright.moe.routing import BROADCAST, Routing


def entropy(probs: Tensor) -> Tensor:
    """H of scores (T, E) in nats with the paper's epsilon inside the logarithm; (T,)."""
    return -(probs * (probs + 1e-5).log()).sum(-1)


def uncertain(
    probs: Tensor,
    threshold: float,
    unit: Literal["nats", "normalised", "share"] = "nats",
    limit: int | None = None,
    real: Tensor | None = None,
    length: int = 0,
) -> Tensor:
    """Which tokens are broadcast, (T,) bool. limit: at most so many per sequence of `length` tokens, in order of position."""
    h = entropy(probs.detach())
    if real is not None:
        h = h.masked_fill(~real, -1.0)
    if unit == "share":
        n = round(threshold * (len(h) if real is None else int(real.sum())))
        found = torch.zeros_like(h, dtype=torch.bool)
        found[h.argsort(descending=True, stable=True)[:n]] = True
    else:
        found = h >= (threshold * torch.log(h.new_tensor(float(probs.shape[1]))) if unit == "normalised" else threshold)
    found = found if real is None else found & real
    if limit is not None:
        rows = found.view(-1, length or len(found))
        found = (rows & (rows.cumsum(1) <= limit)).flatten()
    return found


def broadcast(
    logits: Tensor,
    weights: Tensor,
    index: Tensor,
    where: Tensor,
    *,
    mode: Literal["broadcast", "released"] = "broadcast",
    match_scale: bool = False,
    real: Tensor | None = None,
) -> Routing:
    """A choice (T, k) with the tokens of `where` (T,) bool sent to every expert, or past all of them in mode released."""
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    routing = Routing.of(logits, probs, index, weights, (~where)[:, None].expand_as(index), real)
    token, E = where.nonzero().flatten(), probs.shape[1]
    if mode == "released":
        return replace(routing, passed_by=probs[:, -1] * where)
    scaled = probs[token] * (weights.detach()[token].sum(1, keepdim=True).to(probs) if match_scale else 1.0)
    every = torch.arange(E, device=index.device).repeat(len(token))
    return routing.plus(token.repeat_interleave(E), every, scaled.flatten(), BROADCAST)
