"""LoRAMoE's layer (2312.09979): a frozen linear layer with N small adapters and a soft router, and its balancing constraint.

    o = W0 x + b + (alpha / r) sum_n w_n B_n A_n dropout(x),   w = softmax(x Wr^T)      every expert runs

    Q[m, n] = mass of expert n on sample m,   Z = I * Q,   L = var(Z) / mean(Z)
    I = 1 + delta where the expert's type is the sample's, else 1 - delta

Form: A is (N r, in) and B (out, N r), so the layer is one low-rank product of rank N r with the router's weights between its
halves: o = W0 x + B ((A x) * repeat(w, r)) * alpha / r. The official code loops over experts.

The constraint as printed is minimal where Z is constant, so Q ~ 1 / I: matching experts get (1 - delta) / N and the others
(1 + delta) / N, the opposite of the paper's words. Groups are exchangeable, so training is no worse, but the names of the
groups are swapped. convention "prefer_match" has I = 1 - delta where types match; "paper" is the printed rule.
form "official" is var / mean^2: a coefficient differs by the factor mean(Z) from the paper's. Ours: Q is the mean over real
tokens, so neither padding nor length counts; mass "sum" is the paper's sum over tokens.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.moe.balance import recomputing
from modelwright.moe.precision import linear


class LoraMoeLinear(nn.Linear):
    """A linear layer with N LoRA experts. Its own weight keeps its name; a `sink` list collects w while training."""

    def __init__(self, d_in: int, d_out: int, bias: bool, *, experts: int, r: int, alpha: float, dropout: float = 0.0, **kwargs: Any):
        super().__init__(d_in, d_out, bias, **kwargs)
        self.experts, self.r, self.scale, self.dropout = experts, r, alpha / r, dropout
        self.lora_A = nn.Parameter(self.weight.new_empty(experts * r, d_in))
        self.lora_B = nn.Parameter(self.weight.new_empty(d_out, experts * r))
        self.lora_route = nn.Parameter(self.weight.new_empty(experts, d_in))
        self.sink: list[Tensor] | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """A and the router uniform as LoRA's A, B zero: the layer is the base, bit for bit."""
        for p in (self.lora_A, self.lora_route):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def gate(self, x: Tensor) -> Tensor:
        """w (..., N), a softmax in fp32."""
        return linear(x, self.lora_route).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        w = self.gate(x)
        if self.sink is not None and self.training and not recomputing():
            self.sink.append(w)
        h = linear(F.dropout(x, self.dropout, self.training), self.lora_A).unflatten(-1, (self.experts, self.r))
        h = (h * (w * self.scale).to(h.dtype)[..., None]).flatten(-2)
        base = linear(x, self.weight, self.bias)
        return base + linear(h, self.lora_B).to(base.dtype)


@torch.no_grad()
def merged(layer: LoraMoeLinear, gate: Tensor | None = None) -> Tensor:
    """The weight of a plain linear layer with the gate fixed at `gate` (N,), or dropped: the same share for each expert."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)  # rounded once, at the end
    gate = layer.weight.new_full((layer.experts,), 1 / layer.experts, dtype=wide) if gate is None else gate.to(wide)
    delta = (layer.lora_B.to(wide) * (gate.repeat_interleave(layer.r) * layer.scale)) @ layer.lora_A.to(wide)
    return (layer.weight.to(wide) + delta).to(layer.weight.dtype)


def wrap(model: nn.Module, names: list[str], *, experts: int, r: int, alpha: float, dropout: float = 0.0) -> list[LoraMoeLinear]:
    """Replace the named linear layers in place by ones with experts; their weights are kept. Returns the new layers."""
    found = []
    for name in names:
        old: Any = model.get_submodule(name)
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = LoraMoeLinear(
            old.in_features, old.out_features, old.bias is not None, experts=experts, r=r, alpha=alpha, dropout=dropout, **like
        )
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new.train(old.training))
        found.append(new)
    return found


def mass(w: Tensor, real: Tensor | None = None, kind: Literal["mean", "sum"] = "mean") -> Tensor:
    """Q (B, N): the weight that each sample's real tokens give to each expert; w (B, T, N), real (B, T)."""
    mask = w.new_ones(w.shape[:2]) if real is None else real.to(w.dtype)
    q = torch.einsum("btn,bt->bn", w, mask)
    return q / mask.sum(1, keepdim=True).clamp(min=1) if kind == "mean" else q


def localized(
    q: Tensor,
    types: Tensor | None,
    *,
    delta: float = 0.1,
    convention: Literal["prefer_match", "paper"] = "prefer_match",
    form: Literal["paper", "official"] = "paper",
) -> Tensor:
    """The localized balancing constraint of one layer: q (M, N), types (M,) of 0 and 1; None: plain balancing.

    The first N // 2 experts are of type 1.
    """
    importance = torch.ones_like(q)
    if types is not None:
        of = torch.arange(q.shape[1], device=q.device) < q.shape[1] // 2
        match = of[None] == types.to(q.device).bool()[:, None]
        importance = 1 + delta * (2.0 * match - 1) * (1 if convention == "paper" else -1)
    z = (importance * q).flatten()
    return z.var() / (z.mean() if form == "paper" else z.mean().square() + 1e-10)


def trainable(layers: list[tuple[int, int]], experts: int, r: int) -> int:
    """Parameters that train for linear layers (in, out): N (in + out) r + N in, each."""
    return sum(experts * (i + o) * r + experts * i for i, o in layers)
