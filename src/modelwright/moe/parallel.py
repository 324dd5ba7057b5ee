"""Expert parallelism: the experts of a layer lie on the processes of a group, and tokens travel to them and back.

    dist.start(2)                                                # under torchrun
    gate_up, down = share(gate_up), share(down)                  # this process's experts, of (E, ., .)
    logits, _ = score(x, router)                                 # x (T, d): this process's tokens; router (E, d) as everywhere
    routing = rectify_over(logits, 1, factor=1.0)                # slots are shared by all processes
    y = execute_over(x, routing, gate_up, down)                  # (T, d)

rectify_over is modelwright.moe.rectify on the logits of the whole group (gathered: E numbers per token), so every process
takes the same decisions, those of simulated ranks. Tokens per process may differ, and may be none. A token that intra
rectifies stays on its own process. fill_in and intra off is the plain router under a capacity.

execute_over takes any list over the E experts. Counts are exchanged first, then rows, by all_to_all_single, which gloo has
too, with uneven and empty parts. Weights stay at home, for what comes back.

Gradients. Experts get theirs whole, from the sum of all processes' losses; x and logits get their own; sum the router's, as
data parallelism does. All processes of the group must call, forward and backward, those without tokens too, and agree on
what needs a gradient. The gathered logits need no way back: a token's weights depend on no other token's scores.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.moe.execute import experts
from modelwright.moe.rectify import rectify
from modelwright.moe.routing import Routing

Group = Any  # of torch.distributed; None: all processes


def _place(group: Group) -> tuple[int, int]:
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def share(weight: Tensor, group: Group = None) -> Tensor:
    """This process's consecutive part of weight (E, ...)."""
    rank, ranks = _place(group)
    if len(weight) % ranks:
        raise UserError(f"{len(weight)} experts cannot lie on {ranks} ranks", "the shares would differ", "choose a divisor")
    return weight.chunk(ranks)[rank]


def rectify_over(logits: Tensor, k: int, *, group: Group = None, real: Tensor | None = None, **options: Any) -> Routing:
    """The rectified routing of this process's logits (T, E), decided over the group. options: those of `rectify`."""
    rank, ranks = _place(group)
    if ranks == 1:
        return rectify(logits, k, real=real, **options)
    T, E = logits.shape
    sizes = [torch.zeros(1, dtype=torch.long, device=logits.device) for _ in range(ranks)]
    dist.all_gather(sizes, sizes[0].new_tensor([T]), group=group)
    longest = max(int(n) for n in sizes)  # shares are padded to it; padding takes no slot
    there = logits.new_ones(T) if real is None else real.to(logits.dtype)
    mine = F.pad(torch.cat([logits, there[:, None]], 1), (0, 0, 0, longest - T))
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine.detach(), group=group)
    parts[rank] = mine  # with its gradient
    whole = torch.cat(parts)
    routing = rectify(whole[:, :E], k, real=whole[:, E].detach() > 0, ranks=ranks, **options)
    start = rank * longest
    own = (routing.token >= start) & (routing.token < start + longest)
    return replace(
        routing,
        token=routing.token[own] - start,
        expert=routing.expert[own],
        weight=routing.weight[own],
        source=routing.source[own],
        logits=logits,
        probs=routing.probs[start : start + T],
        asked=(T if real is None else int(real.sum())) * k,
        real=real,
    )


def _exchange(rows: Tensor, give: list[int], take: list[int], group: Group) -> Tensor:
    if not dist.is_initialized():
        return rows.clone()
    out = rows.new_empty(sum(take), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), take, give, group=group)
    return out


class _Exchange(torch.autograd.Function):
    """Rows (R, d) in the order of their destinations, give[i] of them to process i; take[i] come from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], take: list[int], group: Group) -> Tensor:
        ctx.ways = give, take, group
        return _exchange(rows, give, take, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        give, take, group = ctx.ways
        return _Exchange.apply(g, take, give, group), None, None, None


def execute_over(
    x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu, *, group: Group = None
) -> Tensor:
    """The layer's output (T, d) for this process's x (T, d) and routing list; gate_up and down: this process's share."""
    _, ranks = _place(group)
    per, E = len(down), routing.probs.shape[1]
    if per * ranks != E:
        raise UserError(f"{per} experts on each of {ranks} ranks, but {E} are routed to", how="give each process its share of the experts")
    order = routing.expert.argsort(stable=True)  # by expert, so by process
    token, weight = routing.token[order], routing.weight[order]
    sent = routing.counts()
    came = _exchange(sent, [per] * ranks, [per] * ranks, group)  # from each process, for each expert here
    give, take = sent.view(ranks, per).sum(1).tolist(), came.view(ranks, per).sum(1).tolist()
    here = _Exchange.apply(x.index_select(0, token), give, take, group)
    index = torch.arange(E, device=x.device).remainder(per).repeat_interleave(came)[:, None]
    y = experts(here, index, here.new_ones(len(here), 1), gate_up, down, act)
    back = _Exchange.apply(y, take, give, group) * weight[:, None]
    out = back.new_zeros(x.shape).index_add(0, token, back).to(x.dtype)
    return out if routing.past is None else out + (routing.past[:, None] * x).to(out.dtype)
