"""Rectify-Router, "Turn Waste into Worth" (2402.12399): what to do with tokens dropped by a capacity, and with empty slots.

What for: training or serving with a fixed number of slots per expert (static shapes, expert parallelism, latency caps). It
needs no training; as a start, upcycled identical experts with intra-GPU rectification are the dense model at any capacity.

    fill-in (the paper's FR; "KR" in its tables): route to k + 1 experts with the capacity of k. The last choices only take
        slots that all others left empty.
    intra-GPU (IR; "LR"): a token with n < K kept choices gets its best expert h among those on its own rank, without any
        capacity: y = (sum_kept p_j E_j + (K - n) p_h E_h) / (sum_kept p_j + (K - n) p_h),  K = k, or k + 1 with fill-in.

Tokens are placed in order of their largest score, all first choices before any second. Denominators carry no gradient, so a
single kept expert's score still learns; for K = 1 the weight is exactly 1 with the gradient of p. Which tokens are
rectified: "all" (dropped everywhere; the only choice for K = 1), "any" (n < K), "ignore_last" (n < K - 1; with fill-in: a
missing fill-in is no drop). Among fill-ins the paper's text orders by their own score and the code by the token's largest:
fill_order. The official code runs only inside a patched DeepSpeed, and its k-th gate overwrites the priority it computed.
Ours: ranks are simulated on one device, tokens and experts in equal consecutive shares. Over real processes the same
decisions are taken by modelwright.moe.parallel: tune.rectify trains so in data parallelism, `Lists` in expert parallelism.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.moe.routing import CHOSEN, FILLED, LOCAL, Routing, capacity, place, top_k

Unrouted = Literal["all", "any", "ignore_last"]


def rectify(
    logits: Tensor,
    k: int,
    *,
    factor: float = 1.0,
    fill_in: bool = True,
    intra: bool = True,
    unrouted: Unrouted | None = None,
    ranks: int = 1,
    fill_order: Literal["paper", "code"] = "paper",
    least: int = 1,
    real: Tensor | None = None,
) -> Routing:
    """The rectified routing of logits (T, E) with ceil(k T / E * factor) slots per expert."""
    T, E = logits.shape
    K = k + fill_in
    if E % ranks:
        raise UserError(f"{E} experts cannot lie on {ranks} ranks", "the shares would differ", "choose a divisor")
    probs = logits.float().softmax(-1) if logits.dtype != torch.float64 else logits.softmax(-1)
    index = top_k(probs, K)
    tokens = T if real is None else int(real.sum())
    kept = _placed(probs, index, k, capacity(tokens, E, k, factor, least), fill_in and fill_order == "paper", real)
    token, slot = kept.nonzero(as_tuple=True)
    expert = index[token, slot]
    p = probs[token, expert]
    source = torch.where(slot >= k, FILLED, CHOSEN).to(torch.uint8)
    n = kept.sum(1)
    if intra:
        lost = {"all": n == 0, "any": n < K, "ignore_last": n < max(K - 1, 1)}[
            unrouted or ("all" if K == 1 else "ignore_last" if fill_in else "any")
        ]
        extra = (lost if real is None else lost & real).nonzero().flatten()
        per, rank = E // ranks, extra * ranks // max(T, 1)
        local = probs.detach()[extra].view(len(extra), ranks, per)[torch.arange(len(extra), device=rank.device), rank]
        h = local.argmax(1) + rank * per
        token, expert = torch.cat([token, extra]), torch.cat([expert, h])
        p = torch.cat([p, probs[extra, h] * (K - n[extra])])
        source = torch.cat([source, torch.full_like(extra, LOCAL, dtype=torch.uint8)])
    if K == 1:
        weight = p - p.detach() + 1
    else:
        whole = p.detach().new_zeros(T).index_add_(0, token, p.detach())
        weight = p / whole[token].clamp(min=torch.finfo(p.dtype).tiny)
    return Routing(token, expert, weight, source, logits, probs, tokens * k, real)


def _placed(probs: Tensor, index: Tensor, k: int, slots: int, by_own_score: bool, real: Tensor | None) -> Tensor:
    best = probs.detach().amax(1)
    if not by_own_score or index.shape[1] == k:
        return place(index, probs.shape[1], slots, order="priority", priority=best, real=real)
    kept = place(index[:, :k], probs.shape[1], slots, order="priority", priority=best, real=real)
    free = slots - index[:, :k][kept].bincount(minlength=probs.shape[1])
    last = index[:, k:]
    score = probs.detach().gather(1, last).flatten()
    return torch.cat([kept, place(last, probs.shape[1], free, order="priority", priority=score, real=real)], 1)


# ---- the published tables --------------------------------------------------------------------------------------------
def averages(table: dict[str, list[Any]]) -> dict[str, float]:
    """Mean over the benchmarks of each router of a released accuracy table (percent)."""
    columns = [v for name, v in table.items() if name != "Test Router"]
    return {router: math.fsum(c[i] for c in columns) / len(columns) for i, router in enumerate(table["Test Router"])}


def relative_gains(table: dict[str, list[Any]], base: str = "Top-1") -> dict[str, float]:
    """Gain of each router's average over `base`, as a share."""
    mean = averages(table)
    return {router: value / mean[base] - 1 for router, value in mean.items()}
