"""RMoE (2408.06793): a router that is recurrent over depth. The router of a layer sees what earlier routers decided.

    u_i = W1_i x_i                      (p, d), own per layer; x_i is what the experts get
    h_i = GRU(u_i, h_{i-1}), h_0 = 0    shared by all layers, each token by itself; torch's GRUCell
    logits_i = W2_i h_i                 (E, p), own per layer

What for: pre-training or continuing a mixture of experts with better routing at little cost. The state runs over depth, not
over time, so decoding needs no cache for it. The published gain grows with depth and is nil at six layers (gain_by_depth).

The paper's: the equations, gradients through h to all earlier routers, p=128, top-k weights renormalised. Variants it is
compared with: passing "none" (NP: h_{i-1} = 0, same parameters), "detach" (no gradient through h), residual alpha
(NP-r: scores_i = probs_i + alpha probs_{i-1}), another cell.
The official code cannot run as published (its cell's constructor raises, the weights stay uninitialised), and a dense layer
between two sparse ones resets the state. Ours: the state is an argument and a result, never an attribute: right under
gradient checkpointing and past dense layers.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from modelwright.moe.precision import linear
from modelwright.moe.routing import select

Passing = Literal["full", "detach", "none"]
CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}


class RouterCell(nn.Module):
    """The cell that all routers share: (T, p) input and (T, state) -> (T, state), whose first p entries are the output h."""

    def __init__(self, p: int, kind: Literal["gru", "rnn", "lstm"] = "gru"):
        super().__init__()
        self.p, self.kind, self.core = p, kind, CELLS[kind](p, p)

    @property
    def state(self) -> int:
        """Width of the state."""
        return self.p * (2 if self.kind == "lstm" else 1)

    def forward(self, u: Tensor, state: Tensor) -> Tensor:
        u, state = u.to(self.core.weight_ih.dtype), state.to(self.core.weight_ih.dtype)
        if self.kind == "lstm":
            return torch.cat(self.core(u, (state[:, : self.p], state[:, self.p :])), 1)
        return self.core(u, state)


class RecurrentRouter(nn.Module):
    """One layer's router. The state (T, state + E with a residual, else T, state) is handed from layer to layer."""

    def __init__(self, d: int, p: int, experts: int, k: int, passing: Passing = "full", residual: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, p))
        self.project = nn.Linear(d, p, bias=False)
        self.k, self.passing, self.residual = k, passing, residual
        nn.init.normal_(self.weight, std=0.02)

    def begin(self, x: Tensor, cell: RouterCell) -> Tensor:
        """The state before the first sparse layer: zeros."""
        return x.new_zeros(len(x), cell.state + (len(self.weight) if self.residual else 0))

    def forward(self, x: Tensor, state: Tensor, cell: RouterCell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (T, E), weights and index (T, k), and the state for the next layer."""
        h, before = state[:, : cell.state], state[:, cell.state :]
        h = torch.zeros_like(h) if self.passing == "none" else h.detach() if self.passing == "detach" else h
        with torch.autocast(x.device.type, enabled=False):  # routers choose in the type of their own weights
            h = cell(linear(x, self.project.weight), h)
            logits = linear(h[:, : cell.p], self.weight).float()
        probs = logits.softmax(-1)
        scores = probs + self.residual * before.float() if self.residual else probs
        index, weights = select(scores, self.k, renormalise=self.k > 1)
        return logits, weights.to(x.dtype), index, torch.cat([h, probs.to(h)], 1) if self.residual else h


def extra_parameters(p: int, d: int, experts: int, layers: int) -> int:
    """Parameters that RMoE adds to linear routers: 6p^2 + 6p for the GRU, p (d + E) - E d per layer."""
    return 6 * p * p + 6 * p + layers * (p * d + experts * p - experts * d)


def mutual_information(a: Tensor, b: Tensor, bins: int = 100) -> float:
    """Mutual information in nats of two sets of gate scores, from their joint histogram; paired values of any shape."""
    a, b = a.flatten().double(), b.flatten().double()
    place = [((v - v.min()) / (v.max() - v.min()).clamp(min=1e-12) * bins).long().clamp(max=bins - 1) for v in (a, b)]
    joint = torch.bincount(place[0] * bins + place[1], minlength=bins * bins).double().view(bins, bins) / len(a)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / apart.clamp(min=1e-300)).sum())


def gain_by_depth(rows: list[dict[str, str]], column: str = "val_bpc") -> dict[int, float]:
    """Published bits per character of SMoE minus RMoE by number of layers, from the released table."""
    value = {(int(r["layers"]), r["router"]): float(r[column]) for r in rows}
    return {n: round(v - value[n, "RMoE"], 6) for (n, router), v in value.items() if router == "SMoE"}


def similarity(info: dict[str, dict[str, list[float]]], field: str = "normed_sim") -> dict[str, float]:
    """Mean similarity of experts over layers by method, from the released analysis; lower is more diverse."""
    return {name: math.fsum(values[field]) / len(values[field]) for name, values in info.items()}
