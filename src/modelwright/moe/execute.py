"""Run the experts on a routing list: sort the rows by expert, two grouped matrix products, add up.

    y[t] = sum over rows (t, e, w) of w * down_e (act(gate_e x_t) * (up_e x_t))

Layout as in transformers 5: gate_up (E, 2f, d), gate first; down (E, d, f). Importing this file registers the executor
under NAME in transformers' experts interface, so it drives every stock model: `use(model)`.

The gated layer without biases is ONE autograd.Function: rows are gathered once, weights are applied where the tensor is
in hand, and only x, the hidden rows and their activation are kept. What transformers' eager loop pays (E times a
full-size zero gradient for the fused weights: 28 times the dense floor at 64 experts) does not exist here.
Products go to torch's grouped_mm where it can run, else to one matrix product per expert into place: odd widths, fp64,
unaligned or overlapping weights. Other layouts (biases, interleaved, ungated, post-norm) are composed of the same product.
First derivatives only. Under torch.compile and transformers' expert parallelism its own executors are called.

grouped_mm needs rows of whole 16 bytes: widths that are multiples of 8 in bf16 and fp16, of 4 in fp32. transformers' own
executor of that name, which stock models use, stops at any other width. Importing this file registers `_stock` under that
name: transformers' function where its kernel can run, ours where it would stop. Measured on one thread of a CPU in bf16, 512
tokens, 4 experts, d = 64: forward and backward take 1.5 times as long with a width of 172 as with 176, padded at each call 0.8
times; at d = 512 and width 1365 it is 1.1 and 1.2. Padding would copy all experts at each call, so it is not done.

Types. Experts compute in the type of their weights, whatever the type of the tokens and of the router; under autocast in
autocast's type, so weights that are kept in fp32 for training are multiplied in bf16. The output has the tokens' type.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from modelwright.moe.precision import computing
from modelwright.moe.routing import Routing

NAME = "modelwright"
Offsets = Tensor  # (E,) int32: where the rows of each expert end
# rows in order of expert, their tokens, the inverse order or None, and where each expert's rows end
Plan = tuple[Tensor, Tensor, Tensor | None, Offsets]


def supports_grouped_mm(*weights: Tensor) -> bool:
    """Whether torch's grouped_mm runs these weights (E, a, b): type, device, and strides of whole 16 bytes."""
    if not hasattr(F, "grouped_mm"):  # torch 2.9
        return False
    for w in weights:
        cuda = w.device.type == "cuda"
        if w.dtype not in ((torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16, torch.float16)):
            return False
        if cuda and torch.cuda.get_device_capability(w.device) < (8, 0):
            return False
        unit, (e, a, b), (se, sa, sb) = 16 // w.element_size(), w.shape, w.stride()
        dense = sb == 1 and sa >= b and not sa % unit or sa == 1 and sb >= a and not sb % unit
        if not dense or a % unit or b % unit or se % unit or w.data_ptr() % 16 or not e * a * b:
            return False
    return True


def product(x: Tensor, weight: Tensor, offsets: Offsets, grouped: bool) -> Tensor:
    """x (R, in), sorted by expert, times each row's expert of weight (E, in, out): (R, out)."""
    if grouped:
        return F.grouped_mm(x, weight, offs=offsets)
    out, start = x.new_empty(len(x), weight.shape[2]), 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    return out


def outer(x: Tensor, g: Tensor, offsets: Offsets, grouped: bool) -> Tensor:
    """Per expert x^T g over its rows: (R, a), (R, b) -> (E, a, b); zero for an expert without rows."""
    if grouped:
        return F.grouped_mm(x.T, g, offs=offsets)
    out, start = x.new_empty(len(offsets), x.shape[1], g.shape[1]), 0
    for e, end in enumerate(offsets.tolist()):
        torch.mm(x[start:end].T, g[start:end], out=out[e])
        start = end
    return out


class Product(torch.autograd.Function):
    """`product` with its gradient, for the layouts that are composed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.grouped = len(x) > 0 and supports_grouped_mm(weight)
        return product(x, weight, offsets, ctx.grouped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, offsets = ctx.saved_tensors
        g, need = g.contiguous(), ctx.needs_input_grad
        g_x = product(g, weight.mT, offsets, ctx.grouped) if need[0] else None
        return g_x, outer(x, g, offsets, ctx.grouped) if need[1] else None, None


def _add_up(rows: Tensor, token: Tensor, tokens: int, slot: Tensor | None) -> Tensor:
    """Rows (R, d) summed by token: (tokens, d)."""
    if slot is None:  # in the order of the list: one process on a CPU gives the same bits each time
        return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token, rows)
    return rows.index_select(0, slot).view(tokens, -1, rows.shape[1]).sum(1)


class _Gated(torch.autograd.Function):
    """The whole layer for a list of rows with their weights (R,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, act: Any) -> Tensor:
        order, token, slot, offsets = plan
        weight = weights.index_select(0, order)[:, None]
        f, grouped = down.shape[2], len(token) > 0 and supports_grouped_mm(gate_up, down)
        h = product(x.index_select(0, token), gate_up.mT, offsets, grouped)  # (R, 2f)
        s = act(h[:, :f])
        y = product(s * h[:, f:], down.mT, offsets, grouped)
        y = y.mul_(weight) if y.dtype == weight.dtype else y * weight
        ctx.save_for_backward(x, weight, gate_up, down, *plan, h, s)
        ctx.act, ctx.grouped = act, grouped
        return _add_up(y, token, len(x), slot).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, gate_up, down, order, token, slot, offsets, h, s = ctx.saved_tensors
        need, f, grouped = ctx.needs_input_grad, down.shape[2], ctx.grouped
        rows = g.index_select(0, token)  # any strides come out dense
        back = product(rows, down, offsets, grouped)  # (R, f): gradient of the activation, weight left out
        a = s * h[:, f:]
        g_weight = weight.new_empty(len(order)).scatter_(0, order, (a * back).sum(1).to(weight.dtype)) if need[1] else None
        w = weight.to(rows.dtype)
        g_down = outer(rows.mul_(w), a, offsets, grouped) if need[3] else None
        back.mul_(w)
        gh = torch.empty_like(h)
        torch.mul(back, s, out=gh[:, f:])
        _backward(ctx.act, back.mul_(h[:, f:]), h[:, :f], gh[:, :f])
        g_gate_up = outer(gh, x.index_select(0, token), offsets, grouped) if need[2] else None
        g_x = _add_up(product(gh, gate_up, offsets, grouped), token, len(x), slot) if need[0] else None
        return g_x, g_weight, g_gate_up, g_down, None, None


def _backward(act: Any, g: Tensor, x: Tensor, out: Tensor) -> None:
    if act is F.silu:
        torch.ops.aten.silu_backward.grad_input(g, x, grad_input=out)
        return
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out.copy_(torch.autograd.grad(act(leaf), leaf, g)[0])


def _plan(expert: Tensor, token: Tensor | int, experts: int, x: Tensor, k: int) -> Plan:
    order = expert.argsort(stable=True)
    token = order // token if isinstance(token, int) else token.index_select(0, order)
    slot = None
    if k and (x.is_cuda or x.element_size() < 4):  # index_add_ is fastest on a CPU, but sums in x's own type, and in any order on a GPU
        slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, token, slot, expert.bincount(minlength=experts).cumsum(0, dtype=torch.int32)


def experts(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """The layer's output (T, d) for x (T, d), index and weights (T, k)."""
    k, (gate_up, down) = index.shape[1], computing(gate_up, down)
    rows = x.to(down.dtype)
    plan = _plan(index.reshape(-1), k, len(down), rows, k)
    return _Gated.apply(rows, weights.reshape(-1), gate_up, down, plan, act).to(x.dtype)


def execute(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """The layer's output (T, d) for a routing list; a token without rows gets zeros, or its input where it passes by."""
    gate_up, down = computing(gate_up, down)
    rows = x.to(down.dtype)
    plan = _plan(routing.expert, routing.token, len(down), rows, routing.k)
    y = _Gated.apply(rows, routing.weight, gate_up, down, plan, act).to(x.dtype)
    return y if routing.passed_by is None else y + (routing.passed_by[:, None] * x).to(y.dtype)


# ---- transformers' experts interface ---------------------------------------------------------------------------------
def activation(module: Any) -> Any:
    return F.silu if type(module).__name__ in ("SiLU", "SiLUActivation") else module


# A routing list that a module's next call follows instead of its arguments; see modelwright.moe.reroute
PENDING: WeakKeyDictionary[nn.Module, Routing] = WeakKeyDictionary()
LOADED: WeakSet[nn.Module] = WeakSet()  # experts that lie on several processes and look there; see modelwright.moe.parallel


def is_plain(module: Any) -> bool:
    """Whether experts have the gated layout without extras, which is the one that takes a ragged list."""
    if not hasattr(module, "is_concatenated"):  # outside the experts interface
        return False
    extras = module.has_bias or module.is_transposed or module.has_post_expert_norm
    return module.has_gate and module.is_concatenated and not extras and type(module)._apply_gate is _default_apply_gate


def _rows_are_whole(module: Any) -> bool:
    """Whether rows of both widths fill whole 16 bytes, which grouped_mm asks for."""
    return all(width * module.down_proj.element_size() % 16 == 0 for width in module.down_proj.shape[1:])


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or self._is_expert_parallel:
        theirs = grouped_mm_experts_forward if _rows_are_whole(self) else batched_mm_experts_forward
        return theirs(self, hidden_states, top_k_index, top_k_weights)
    if is_plain(self):
        if (routing := PENDING.pop(self, None)) is not None:
            return execute(hidden_states, routing, self.gate_up_proj, self.down_proj, activation(self.act_fn))
        return experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, activation(self.act_fn))
    return _composed(self, hidden_states, top_k_index, top_k_weights)


def _composed(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    expert = index.reshape(-1)
    order, token, _, offsets = _plan(expert, index.shape[1], self.num_experts, x, 0)
    expert, name = expert[order], "gate_up_proj" if self.has_gate else "up_proj"

    def linear(rows: Tensor, name: str) -> Tensor:
        (weight,) = computing(getattr(self, name))
        out = Product.apply(rows.to(weight.dtype), weight if self.is_transposed else weight.mT, offsets)
        return out + getattr(self, name + "_bias")[expert] if self.has_bias else out

    h = linear(x.index_select(0, token), name)
    y = linear(self._apply_gate(h) if self.has_gate else self.act_fn(h), "down_proj")
    y = (self.post_expert_norm(y) if self.has_post_expert_norm else y) * weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y.index_select(0, back).view(*index.shape, -1).sum(1).to(x.dtype)


def _stock(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' grouped_mm where its kernel takes the widths and the types, else our executor.

    Its kernel runs in the type of the weights, so under autocast it would multiply weights that are kept in fp32 in fp32.
    """
    as_stored = computing(self.down_proj)[0].dtype == self.down_proj.dtype or torch.compiler.is_compiling()
    run = grouped_mm_experts_forward if as_stored and _rows_are_whole(self) else _forward
    return run(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
ALL_EXPERTS_FUNCTIONS.register("grouped_mm", _stock)


def use(model: nn.Module, name: str = NAME) -> nn.Module:
    """The model, its experts run by `name` from now on: ours, or eager, grouped_mm, batched_mm."""
    model.set_experts_implementation(name)  # type: ignore[operator]
    return model
