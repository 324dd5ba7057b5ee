"""A linear layer with a frozen weight and k values that are added to chosen entries of it.

The changed weight is made for one product and given back at once, in the forward and again in the backward pass, so that what stays in
memory is the k values. The gradient of the whole weight exists for one layer at a time; the difference may look at it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VALUES = "spiel_values"  # name of the parameter


@dataclass
class Delta:
    """The entries of one weight: flat places (k,) in row-major order, and what is collected of its gradient."""

    shape: tuple[int, int]
    indices: Tensor
    collect: bool = False  # in a window of a reselection
    at_once: bool = False  # candidates are chosen from the first pass, without holding a dense gradient
    candidates: Tensor | None = None  # flat places (k,)
    dense: Tensor | None = None  # (numel,) gradient of the first step of a window, summed over its passes
    passes: Tensor | None = None  # (k,) gradient of the candidates, summed over the passes of a step

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def places(self, device: torch.device) -> Tensor:
        """The indices where the weight is."""
        if self.indices.device != device:
            self.indices = self.indices.to(device)
        return self.indices

    def changed(self, weight: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the weight with the values added."""
        whole = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        whole.view(-1).index_add_(0, self.places(weight.device), values.detach().to(dtype))
        return whole

    def see(self, gradient: Tensor) -> None:
        """Collect what a reselection needs of a pass's gradient (out, in) or (in, out), as the weight is stored."""
        if not self.collect:
            return
        flat = gradient.flatten().float()
        if self.candidates is None and self.at_once:
            self.candidates = largest(flat.abs(), len(self.indices))
        if self.candidates is None:
            self.dense = flat if self.dense is None else self.dense.add_(flat)
        else:
            found = flat[self.candidates.to(flat.device)]
            self.passes = found if self.passes is None else self.passes + found


def largest(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest scores, ascending."""
    return scores.topk(min(k, len(scores))).indices.sort().values


class _Product(torch.autograd.Function):
    """x W' + b without keeping W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, delta: Delta, in_out: bool) -> Tensor:
        kind = x.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.delta, ctx.in_out = delta, in_out
        ctx.save_for_backward(x, weight, values)
        whole = delta.changed(weight, values, ctx.dtype)
        return F.linear(x.to(ctx.dtype), whole.T if in_out else whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, values = ctx.saved_tensors
        grad, delta = grad.to(ctx.dtype), ctx.delta
        back = None
        if ctx.needs_input_grad[0]:
            whole = delta.changed(weight, values, ctx.dtype)
            back = (grad @ (whole.T if ctx.in_out else whole)).to(x.dtype)
        given, wanted = x.detach().to(ctx.dtype).flatten(0, -2), grad.flatten(0, -2)
        dense = given.T @ wanted if ctx.in_out else wanted.T @ given
        delta.see(dense)
        return back, None, dense.flatten()[delta.places(dense.device)].to(values.dtype), None, None


class _Sparse(nn.Module):
    """What an adapted layer does instead of its own forward."""

    weight: Tensor
    bias: Tensor | None
    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        found = _Product.apply(x, self.weight, getattr(self, VALUES), self.delta, type(self).__name__ == "Conv1D")
        return found if self.bias is None else found + self.bias.to(found.dtype)


def attach(layer: nn.Module, delta: Delta) -> None:
    """Give a Linear or Conv1D its values, all 0. Its class keeps its name: others recognise layers by it."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (_Sparse, kind), {"plain": kind})
    layer.delta = delta  # type: ignore[assignment]
    layer.register_parameter(VALUES, nn.Parameter(torch.zeros(len(delta.indices), device=layer.weight.device)))  # type: ignore[arg-type]


@torch.no_grad()
def merge(layer: nn.Module, delta: Delta) -> None:
    """Add the values to the weight and take them away."""
    weight: Any = layer.weight
    weight.copy_(delta.changed(weight, getattr(layer, VALUES), torch.float32))
    delattr(layer, VALUES)
    del layer.delta
    layer.__class__ = type(layer).plain  # type: ignore[attr-defined]
