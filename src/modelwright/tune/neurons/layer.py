"""One feed-forward part whose neurons can be permuted and that can run with some of its experts only.

Experts are stretches of neurons: expert e has the neurons e * s to (e + 1) * s - 1, so that nothing is copied but views are taken. A token
goes to the experts of highest x . c_e, c_e being the mean of the normalised rows that read the input (of the gate where there is one).
Chosen experts count once each: with all of them the layer is the dense one.

    y = sum over the chosen e of  down_e (act(gate_e x) * up_e x)  + b_out
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Block, Ffn, View
from modelwright.moe.execute import Product
from modelwright.moe.precision import computing


class Layer:
    """The feed-forward part of a block, by its roles."""

    def __init__(self, model: Any, anatomy: Anatomy, block: Block, experts: int, top_k: int):
        self.module, self.experts, self.top_k = block.feed_forward, experts, top_k
        self.views: Ffn = anatomy.ffn(block)
        self.act = ACT2FN[activation(anatomy.config)]
        held = {v.name: model.get_parameter(v.name) for _, v in self._each()}  # in a pass the model's paths may lead elsewhere
        self._get: Callable[[str], nn.Parameter] = held.__getitem__
        self.neurons = int(self.rows().shape[0])

    def _each(self) -> Iterator[tuple[str, View]]:
        for key in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
            if (view := getattr(self.views, key)) is not None:
                yield key, view

    def read(self, key: str) -> Tensor | None:
        """gate, up (F, d), down (d, F), their biases, or None."""
        view = getattr(self.views, key)
        return None if view is None else view.read(self._get)

    def rows(self) -> Tensor:
        """What reads the input: the gate's rows, or those of the only matrix there is (F, d)."""
        found = self.read("gate") if self.views.gate is not None else self.read("up")
        assert found is not None
        return found

    def matrices(self) -> dict[str, int]:
        """The names of the matrices, and the dimension along which their neurons lie."""
        return {view.name: self._dim(key, view) for key, view in self._each() if not key.endswith("bias")}

    def size(self) -> int:
        """Weights of the matrices."""
        return sum(self._get(name).numel() for name in self.matrices())

    # ---- the order of the neurons
    @torch.no_grad()
    def permute(self, order: Tensor, optimizer: Any) -> None:
        """Put neuron order[i] at place i, in weights, gradients and the optimizer's moments: the function and the next step stay."""
        index: dict[str, Tensor] = {}
        dims: dict[str, int] = {}
        for key, view in self._each():
            if key == "down_bias":
                continue
            p = self._get(view.name)
            dim = self._dim(key, view)
            whole = index.setdefault(view.name, torch.arange(p.shape[dim]))
            begin = view.slices[0].start if view.slices else 0
            whole[begin : begin + len(order)] = begin + order.cpu()
            dims[view.name] = dim
        for name, whole in index.items():
            p = self._get(name)
            state = {} if optimizer is None else optimizer.state.get(p, {})
            for t in [p.data, p.grad, *state.values()]:
                if isinstance(t, Tensor) and t.shape == p.shape:
                    t.copy_(t.index_select(dims[name], whole.to(t.device)))

    def _dim(self, key: str, view: View) -> int:
        """The dimension of a parameter along which its neurons lie."""
        return int((key == "down") != view.transposed) if not key.endswith("bias") else 0

    # ---- some experts only
    def centres(self) -> Tensor:
        """c_e (E, d) of the weights as they are, without a gradient."""
        rows = nn.functional.normalize(self.rows().detach().float(), dim=1)
        return rows.unflatten(0, (self.experts, -1)).mean(1)

    def _grouped(self, key: str, kind: torch.dtype) -> Tensor | None:
        """A matrix as (E, in, out), or a bias as (E, s)."""
        t = self.read(key)
        if t is None:
            return None
        t = t.to(kind)
        if key == "down":
            return t.unflatten(1, (self.experts, -1)).permute(1, 2, 0)
        t = t.unflatten(0, (self.experts, -1))
        return t.mT if t.dim() == 3 else t

    def sparse(self, x: Tensor) -> Tensor:
        """The output (..., d) of the chosen experts, x (..., d)."""
        shape, kind = x.shape, computing(self.rows()[:1].detach())[0].dtype
        flat = x.reshape(-1, shape[-1])
        chosen = (flat.detach().float() @ self.centres().T).topk(self.top_k, 1).indices  # (N, k)
        expert, order = chosen.flatten().sort(stable=True)
        token, ends = order // self.top_k, torch.bincount(expert, minlength=self.experts).cumsum(0).int()
        rows = flat.to(kind)[token]  # (N k, d), sorted by expert

        def into(key: str) -> Tensor | None:
            weight, bias = self._grouped(key, kind), self._grouped(f"{key}_bias", kind)
            if weight is None:
                return None
            out = Product.apply(rows, weight, ends)
            return out if bias is None else out + bias[expert]

        gate, up = into("gate"), into("up")
        h = self.act(up) if gate is None else self.act(gate) * up
        each = Product.apply(h, self._grouped("down", kind), ends)
        y = each.new_zeros(flat.shape).index_add_(0, token, each)
        bias = self.read("down_bias")
        return (y if bias is None else y + bias.to(kind)).view(shape).to(x.dtype)

    @torch.no_grad()
    def require_module(self, name: str) -> None:
        """UserError unless the block's own module gives what all experts together give."""
        experts, k = self.experts, self.top_k
        device, kind = self.rows().device, self.rows().dtype
        x = torch.randn(1, 5, self.rows().shape[1], generator=torch.Generator().manual_seed(0)).to(device, kind)
        training = self.module.training
        try:
            self.experts = self.top_k = 1
            own = self.module.eval()(x)
            fits = isinstance(own, Tensor) and torch.allclose(own, self.sparse(x), rtol=1e-2, atol=1e-2 * float(own.abs().max() + 1e-9))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            fits = False
        finally:
            self.module.train(training)
            self.experts, self.top_k = experts, k
        if not fits:
            raise UserError(
                f"{name} cannot run with some of its neurons only",
                "its feed-forward part is no module of its own, or computes something else than two or three matrices",
                "give a Llama-, Qwen- or GPT-2-style model",
            )


def activation(config: Any) -> str:
    """The name of the activation of the feed-forward parts."""
    for key in ("hidden_act", "activation_function", "dense_act_fn", "hidden_activation"):
        if isinstance(found := getattr(config, key, None), str):
            return found
    raise UserError(f"the config of {config.model_type} names no activation", how="give another model")


def rand_index(a: Tensor, b: Tensor) -> float:
    """Adjusted Rand index of two labellings (N,): 1 where they are the same groups, about 0 where they have nothing in common."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    pairs = lambda n: float((n * (n - 1) / 2).sum())  # noqa: E731
    both, one, two = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = one * two / max(len(a) * (len(a) - 1) / 2, 1)
    most = (one + two) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
