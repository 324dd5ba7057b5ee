"""A mixture-of-experts layer of our own: a router that returns a Routing, experts, and an optional shared expert.

    layer = Layer(TokenChoice(d, experts=8, k=2), d, width=1024, experts=8, shared=256)
    y, routing = layer(x, real)            # routing.record() tells what happened

The router is any module x (T, d), real (T,) -> Routing. Where a router needs a state (RMoE) the model passes it; nothing is
kept on a module between calls, so gradient checkpointing and several threads are safe.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.moe.execute import execute
from modelwright.moe.precision import linear
from modelwright.moe.routing import Order, Routing, capacity, expert_choice, place, score, select


class TokenChoice(nn.Module):
    """Each token chooses k experts. factor limits the slots per expert (infinite: nothing is dropped)."""

    def __init__(
        self,
        d: int,
        experts: int,
        k: int,
        *,
        kind: Literal["softmax", "sigmoid"] = "softmax",
        renormalise: bool | None = None,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        factor: float = math.inf,
        order: Order = "position",
        least: int = 1,
        jitter: float = 0.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, d) * 0.02)
        self.register_buffer("bias", torch.zeros(experts))  # for the choice only; see balance.nudge
        self.k, self.kind, self.jitter, self.factor, self.least = k, kind, jitter, factor, least
        self.order: Order = order
        self.renormalise = k > 1 if renormalise is None else renormalise
        self.scale, self.groups, self.top_groups = scale, groups, top_groups

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        logits, probs = score(x, self.weight, self.kind, self.jitter if self.training else 0.0)
        index, weights = select(
            probs,
            self.k,
            renormalise=self.renormalise,
            scale=self.scale,
            bias=self.bias,  # type: ignore[arg-type]
            groups=self.groups,
            top_groups=self.top_groups,
        )
        kept = None
        if math.isfinite(self.factor):
            tokens = len(x) if real is None else int(real.sum())
            slots = capacity(tokens, probs.shape[1], self.k, self.factor, self.least)
            kept = place(index, probs.shape[1], slots, order=self.order, priority=probs.detach().amax(1), real=real)
        return Routing.of(logits, probs, index, weights, kept, real)


class ExpertChoice(nn.Module):
    """Each expert chooses its tokens; for encoders and training, not for decoding."""

    def __init__(self, d: int, experts: int, factor: float = 2.0, renormalise: bool = False, causal: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, d) * 0.02)
        self.factor, self.renormalise, self.causal = factor, renormalise, causal

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        logits, _ = score(x, self.weight)
        return expert_choice(logits, self.factor, real=real, renormalise=self.renormalise, causal=self.causal)


class Layer(nn.Module):
    """Gated experts of `width` neurons, and a shared expert of `shared` neurons that every token passes (0: none).

    mix: sum (DeepSeek), or gated: the shared part times a sigmoid (Qwen2-MoE). dropped: what a token without any expert
    gives, zero, or its input times its largest score (transformers' Switch).
    """

    def __init__(
        self,
        router: nn.Module,
        d: int,
        width: int,
        experts: int,
        *,
        shared: int = 0,
        mix: Literal["sum", "gated"] = "sum",
        dropped: Literal["zero", "identity"] = "zero",
    ):
        super().__init__()
        self.router, self.dropped = router, dropped
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, d) * 0.02)
        self.down = nn.Parameter(torch.randn(experts, d, width) * 0.02)
        self.shared_up = nn.Linear(d, 2 * shared, bias=False) if shared else None
        self.shared_down = nn.Linear(shared, d, bias=False) if shared else None
        self.shared_gate = nn.Linear(d, 1, bias=False) if shared and mix == "gated" else None

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat, None if real is None else real.reshape(-1))
        if self.dropped == "identity":
            served = torch.zeros(len(flat), dtype=torch.bool, device=x.device).index_fill_(0, routing.token, True)
            lost = ~served if real is None else ~served & real.reshape(-1)
            routing = replace(routing, passed_by=routing.probs.amax(1) * lost)
        y = execute(flat, routing, self.gate_up, self.down)
        if self.shared_up is not None:
            gate, up = linear(flat, self.shared_up.weight).chunk(2, -1)
            part = linear(F.silu(gate) * up, self.shared_down.weight)  # type: ignore[union-attr]
            y = y + (part if self.shared_gate is None else part * linear(flat, self.shared_gate.weight).sigmoid())
        return y.to(x.dtype).view_as(x), routing
