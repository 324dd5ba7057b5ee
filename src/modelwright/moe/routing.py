"""Who goes where: score -> select -> place, one after another, and the ragged list that the executor takes.

    logits, probs = score(x, weight)                  # (T, E) each, fp32
    index, weights = select(probs, 2)                 # (T, 2) each
    kept = place(index, experts, capacity(...))       # (T, 2) bool, only where capacity is limited
    routing = Routing.of(logits, probs, index, weights, kept)

A method that changes one stage replaces one of these functions. A row of the list is (token, expert, weight, source), so
tokens may have any number of experts: dropped slots, broadcasts and rectified tokens are rows that are missing or added.

Conventions. Scores are fp32 whatever the model's type. Equal scores choose the lower index (torch.topk promises no order,
and all scores are equal at step 0 of a zero-initialised router). Padding takes no slot, counts nowhere and is never sent.
Weights: Mixtral and Qwen3 renormalise the chosen k (the same as a softmax over the chosen logits); Qwen2-MoE and OLMoE do
not; with k=1 a renormalised weight is the constant 1 and the router would get no gradient, so that pair is refused.
DeepSeek-V3 (2412.19437): sigmoid scores, a bias that only selects, groups ranked by their two best experts.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.errors import UserError

CHOSEN, FILLED, LOCAL, BROADCAST = 0, 1, 2, 3  # why a row is in the list
Order = Literal["position", "choice", "priority"]


@dataclass(frozen=True)
class Routing:
    """The routing of one layer: a ragged list over R rows, and the scores it came from (with their gradient)."""

    token: Tensor  # (R,)
    expert: Tensor  # (R,)
    weight: Tensor  # (R,)
    source: Tensor  # (R,) why it is here
    logits: Tensor  # (T, E)
    probs: Tensor  # (T, E)
    num_assignments: int  # slots before anything was dropped
    real: Tensor | None = None  # (T,) bool, False for padding
    k: int = 0  # every token has exactly k rows, one after another; 0: ragged
    passed_by: Tensor | None = None  # (T,) weight at which a token's input itself is added: what passes by the experts

    @staticmethod
    def of(
        logits: Tensor, probs: Tensor, index: Tensor, weights: Tensor, kept: Tensor | None = None, real: Tensor | None = None
    ) -> "Routing":
        """The list of a (T, k) choice; `kept` (T, k) bool leaves rows out, `real` (T,) bool leaves tokens out."""
        T, k = index.shape
        num_assignments = T * k if real is None else int(real.sum()) * k
        if real is not None:
            kept = real[:, None].expand(T, k) if kept is None else kept & real[:, None]
        if kept is None:
            token = torch.arange(T, device=index.device).repeat_interleave(k)
            flat = index.reshape(-1), weights.reshape(-1)
        else:
            token, slot = kept.nonzero(as_tuple=True)
            flat = index[token, slot], weights[token, slot]
        source = torch.full_like(token, CHOSEN, dtype=torch.uint8)
        return Routing(token, *flat, source, logits, probs, num_assignments, real, k if kept is None else 0)

    def plus(self, token: Tensor, expert: Tensor, weight: Tensor, source: int) -> "Routing":
        """The list with rows added."""
        return replace(
            self,
            token=torch.cat([self.token, token]),
            expert=torch.cat([self.expert, expert]),
            weight=torch.cat([self.weight, weight.to(self.weight)]),
            source=torch.cat([self.source, torch.full_like(token, source, dtype=torch.uint8)]),
            k=0,
        )

    def counts(self) -> Tensor:
        """Rows per expert, (E,)."""
        return self.expert.bincount(minlength=self.probs.shape[1])

    def record(self) -> "RoutingRecord":
        """What happened, without gradients."""
        chosen = int((self.source == CHOSEN).sum())
        return RoutingRecord(
            self.logits.detach(), self.probs.detach(), self.counts(), self.num_assignments, self.num_assignments - chosen, self.real
        )


@dataclass(frozen=True)
class RoutingRecord:
    """One forward pass of one layer, detached."""

    logits: Tensor  # (T, E)
    probs: Tensor  # (T, E)
    counts: Tensor  # (E,) rows that each expert worked on
    num_assignments: int  # slots that the choices ask for
    dropped: int  # of them not served by the chosen expert
    real: Tensor | None = None  # (T,) bool
    index: Tensor | None = None  # (T, k) where every token has k experts

    def entropy(self) -> Tensor:
        """Of each real token's scores, in nats; 0 is certain and ln E undecided."""
        p = self.probs if self.real is None else self.probs[self.real]
        p = p / p.sum(1, keepdim=True)
        return -torch.special.xlogy(p, p).sum(1)


# ---- score -----------------------------------------------------------------------------------------------------------
def score(
    x: Tensor, weight: Tensor, kind: Literal["softmax", "sigmoid"] = "softmax", jitter: float = 0.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (T, E) of x (T, d) under router rows (E, d), in fp32 (fp64 for fp64) also under autocast.

    jitter: eps of Switch's U(1 - eps, 1 + eps) on the router's input; give it in training only.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(wide)
        if jitter:
            x = x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        logits = F.linear(x, weight.to(wide), None if bias is None else bias.to(wide))
        return logits, logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


# ---- select ----------------------------------------------------------------------------------------------------------
def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the largest scores, best first; equal scores: lower index first, on every device."""
    if k > scores.shape[-1]:
        raise UserError(f"top_k={k} but there are {scores.shape[-1]} experts", how="lower top_k")
    scores = scores.detach().clamp(min=torch.finfo(scores.dtype).min)  # above what marks those that are taken
    if k > 4:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = [scores.argmax(-1)]  # argmax promises the first maximum
    for _ in range(k - 1):
        scores = scores.scatter(-1, best[-1][..., None], -math.inf)
        best.append(scores.argmax(-1))
    return torch.stack(best, -1)


def select(
    probs: Tensor,
    k: int,
    *,
    renormalise: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token, best first, and their weights; (T, k) each.

    bias (E,): added for the choice only, never to a weight. groups, top_groups: experts lie in equal groups, and only those
    of the `top_groups` groups whose two best sum highest may be chosen. scale multiplies the weights.
    """
    T, E = probs.shape
    if k == 1 and renormalise:
        raise UserError(
            "top_k=1 with renormalised weights", "each weight would be 1 and the router would never learn", "set renormalise=False"
        )
    choice = probs.detach() if bias is None else probs.detach() + bias
    if groups > 1:
        if E % groups or top_groups * (E // groups) < k:
            raise UserError(f"{E} experts in {groups} groups, {top_groups} of them open, cannot give {k}", how="change the groups")
        best = choice.view(T, groups, E // groups)
        value = best.topk(min(2, best.shape[-1]), -1).values.sum(-1)
        open_ = torch.zeros_like(value, dtype=torch.bool).scatter_(1, top_k(value, top_groups), True)
        choice = choice.masked_fill(~open_.repeat_interleave(E // groups, 1), -math.inf)
    index = top_k(choice, k)
    weights = probs.gather(1, index)
    if renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return index, weights * scale if scale != 1 else weights


def expert_choice(
    logits: Tensor, factor: float = 2.0, *, real: Tensor | None = None, renormalise: bool = False, causal: bool = True
) -> Routing:
    """Each expert takes its C = ceil(T * factor / E) best tokens (Expert Choice, 2202.09368). Every load is exactly C.

    Whether a token is taken depends on later tokens of the batch, so a causal model sees the future: `causal` warns.
    renormalise divides a token's weights by their sum + 1e-6, as some repositories do; the paper does not.
    """
    if causal:
        warnings.warn("expert choice lets a token's path depend on later tokens: train or encode with it, never decode", stacklevel=2)
    probs = logits.softmax(-1)
    ids = torch.arange(len(probs), device=probs.device) if real is None else real.nonzero().flatten()
    take = min(len(ids), math.ceil(len(ids) * factor / probs.shape[1]))
    chosen = probs[ids].T.sort(dim=1, descending=True, stable=True).indices[:, :take]  # (E, C)
    token = ids[chosen.reshape(-1)]
    expert = torch.arange(probs.shape[1], device=probs.device).repeat_interleave(take)
    weight = probs[token, expert]
    if renormalise:
        weight = weight / (weight.new_zeros(len(probs)).index_add(0, token, weight)[token] + 1e-6)
    return Routing(token, expert, weight, torch.zeros_like(token, dtype=torch.uint8), logits, probs, len(token), real)


# ---- place -----------------------------------------------------------------------------------------------------------
def capacity(tokens: int, experts: int, k: int, factor: float, least: int = 1) -> int:
    """Slots per expert: max(least, ceil(k T / E * factor)). DeepSpeed's own factor is per choice: its 1.0 at k=2 is this."""
    return max(least, math.ceil(k * tokens / experts * factor - 1e-9)) if math.isfinite(factor) else max(tokens, 1)


def place(
    index: Tensor,
    experts: int,
    slots: int | Tensor,
    *,
    order: Order = "position",
    priority: Tensor | None = None,
    real: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Which slots of index (T, k) are kept when each expert has `slots` of them (or slots (E,) each); (T, k) bool.

    position: tokens one after another (GShard). choice: all first choices before any second. priority: as choice, with the
    tokens of highest `priority` (T,) first (V-MoE, Rectify-Router). sequence (T,): number of the sequence that a token
    belongs to; then the slots are per sequence (transformers' Switch), else per batch.
    """
    T, k = index.shape
    slot = torch.arange(T * k, device=index.device).view(T, k)  # slot t k + j is choice j of token t
    if order == "priority":
        if priority is None:
            raise UserError("order=priority without priorities", "the order of the tokens is unknown", "give each token's largest score")
        in_turn = slot[priority.argsort(descending=True, stable=True)].T.reshape(-1)
    elif order == "choice":
        in_turn = slot.T.reshape(-1)
    else:
        in_turn = slot.reshape(-1)

    # A queue is an expert, or an expert within a sequence. Padding stands in a queue of its own, after all others.
    queue = index if sequence is None else index + experts * sequence[:, None]
    queues = experts if sequence is None or not T else experts * (int(sequence.max()) + 1)
    if real is not None:
        queue = torch.where(real[:, None], queue, queues)
    queue = queue.reshape(-1)[in_turn]  # of each slot, in the order in which slots are filled

    # Sorting by queue keeps that order inside each, so a slot's rank is its place minus where its queue begins.
    by_queue = queue.argsort(stable=True)
    sorted_queue = queue[by_queue]
    length = queue.bincount(minlength=queues + 1)
    begin = length.cumsum(0) - length
    rank = torch.arange(T * k, device=index.device) - begin[sorted_queue]
    limit = slots[sorted_queue % experts] if isinstance(slots, Tensor) else slots
    kept = torch.empty(T * k, dtype=torch.bool, device=index.device)
    kept[in_turn[by_queue]] = (rank < limit) & (sorted_queue < queues)
    return kept.view(T, k)
