"""Expert parallelism: the experts of a layer lie on the processes of a group, and tokens travel to them and back.

transformers lays a stock model's experts on processes while it loads them, sums their gradients and saves them whole. This
file adds what it lacks: routing lists in which tokens have different numbers of experts, and rectification over processes.

    import modelwright.moe.parallel                # under torchrun; registers ep_implementation "modelwright"
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="modelwright")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    with rerouted(model, lambda layer, logits, w, i, real: rectify_over(logits, 2, real=real)):
        loss = ...                                 # of this process's rows
    model.save_pretrained(folder)                  # by all processes; the ordinary files

Gradients are then the mean over the processes of each one's own, for experts and for all other weights.

Under it lies the layer, on bare tensors:

    gate_up, down = share(gate_up), share(down)    # this process's experts, of (E, ., .)
    routing = rectify_over(logits, 1, factor=1.0)  # slots are shared by all processes
    y = execute_over(x, routing, gate_up, down)    # x, y (T, d): this process's tokens

rectify_over is modelwright.moe.rectify on the logits of the whole group (gathered: E numbers per token), so every process
takes the same decisions, those of simulated ranks. Tokens per process may differ, and may be none. A token that intra
rectifies stays on its own process. The paper's code does this inside a patched DeepSpeed; this is ours.

execute_over takes any list over the E experts. Counts are exchanged first, then rows, by all_to_all_single, which gloo has
too, with uneven and empty parts. Weights stay at home, for what comes back. transformers' own exchange takes k experts for
every token and no list. On bare tensors experts get their gradients whole, from the sum of all processes' losses. The
gathered logits need no way back: a token's weights depend on no other token's scores.

All processes of the group must call, forward and backward, equally often, those without tokens too, and agree on what needs
a gradient; so generate(synced_gpus=True).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.moe.execute import LOADED, PENDING, activation, experts, is_plain
from modelwright.moe.rectify import rectify
from modelwright.moe.routing import Routing


def _stock() -> tuple[Any, Any]:
    """transformers' class of ways to lay experts on processes, and the registry of them; older ones have neither."""
    try:
        from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    except ImportError:
        return object, None
    return EPImplementation, EPImplementationInterface


_Base: Any
_Base, _ways = _stock()
NAME = "modelwright"  # of ep_implementation
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
        num_assignments=(T if real is None else int(real.sum())) * k,
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
    return out if routing.passed_by is None else out + (routing.passed_by[:, None] * x).to(out.dtype)


# ---- stock models ----------------------------------------------------------------------------------------------------
class Lists(_Base):
    """How the experts of a stock model get their tokens: by any routing list, or as their router chose. See NAME."""

    def __init__(self, module: Any, ep_mesh: Any, tp_mesh: Any):
        if not is_plain(module):
            raise UserError(
                f"{type(module).__name__} cannot be spread over processes by routing lists",
                "its experts are not gated layers without biases",
                "leave ep_implementation out",
            )
        if tp_mesh is not None and tp_mesh.size() > 1:
            raise UserError(
                "routing lists do not go with tensor parallelism", "its processes share their tokens", "set tp_size: 1, or leave it out"
            )
        super().__init__(module, ep_mesh, tp_mesh)
        self.module = module
        LOADED.add(module)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        m, group = self.module, self.ep_mesh.get_group()
        if (routing := PENDING.pop(m, None)) is None:
            scores = top_k_weights.new_empty(0, len(m.down_proj) * self.ep_mesh.size())  # only their width is read
            routing = Routing.of(scores, scores, top_k_index, top_k_weights)
        return execute_over(hidden_states, routing, m.gate_up_proj, m.down_proj, activation(m.act_fn), group=group)


if _ways is not None:
    _ways.register(NAME, Lists)
