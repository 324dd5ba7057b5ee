"""HyperMoE (2402.12656): a hypernetwork makes a small adapter from the identity of the experts that a token did NOT choose.

    s = sum of V_j over unselected experts j         V (E, e), own per layer
    q = process(s)                                   Linear, ReLU, Linear; own per layer
    z = ReLU(Linear([q; l_i]))                       l_i (c): embedding of the layer; from here on shared by all layers
    adapter(x) = U^T ReLU(D^T x + b_D) + b_U         D (d, a), U (a, d), b_D, b_U: linear in z
    y = sum_j w_j E_j(x) + adapter(x)                not scaled by the router

What for: fine-tuning a sparse model with few active experts, to use what the idle ones know. The paper's: the equations, all
sizes (e = hidden = q = b = 128, c = 10, a = 64), hyperfan-in weights. The official code makes one adapter per token: d=768
and 2,048 tokens are 805 MB of generated weights.

Ours, exact: an adapter depends on the set of chosen experts only, so one is made per distinct set and tokens are grouped by
set (top-1: at most E adapters). Where there are so many sets that this would be larger, the products are reordered:
D^T x = sum_b z_b (H_b^T x). `table` holds the adapters of all sets for inference, at no hypernetwork cost. init "zero" starts
U and b_U at zero, so the model is unchanged bit for bit. The paper's start is no identity: over five seeds on a trained model of
five layers (d = 64, logits up to 21) it moves the first layer's output by up to 1e-3, the last one's by up to 3e-2 and logits by
up to 0.04; where logits are larger it is more, 0.27 was seen. With every expert chosen there is no unselected one: s = 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.moe.execute import Product
from modelwright.moe.precision import linear


def _through(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer that may be of another type than x."""
    return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


@dataclass
class Adapters:
    """Generated weights of G expert sets."""

    down: Tensor  # (G, d, a)
    down_bias: Tensor  # (G, a)
    up: Tensor  # (G, a, d)
    up_bias: Tensor  # (G, d)

    @torch.compiler.disable  # what it traces of a grouped product knows bf16 alone
    def __call__(self, x: Tensor, of: Tensor) -> Tensor:
        """Each token x (T, d) through the adapter of its set, of (T,)."""
        order = of.argsort(stable=True)
        offsets = of.bincount(minlength=len(self.down)).cumsum(0, dtype=torch.int32)
        which = of.index_select(0, order)
        h = F.relu(Product.apply(x.index_select(0, order).to(self.down.dtype), self.down, offsets) + self.down_bias.index_select(0, which))
        y = Product.apply(h.to(self.up.dtype), self.up, offsets) + self.up_bias.index_select(0, which)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y.index_select(0, back).to(x.dtype)


class HyperNetwork(nn.Module):
    """The generator that all layers share."""

    def __init__(self, d: int, layers: int, *, a: int = 64, b: int = 128, q: int = 128, c: int = 10):
        super().__init__()
        self.d, self.a = d, a
        self.layer_embedding = nn.Parameter(torch.randn(layers, c))
        self.mix = nn.Linear(q + c, b)
        self.down, self.down_bias = nn.Linear(b, d * a), nn.Linear(b, a)
        self.up, self.up_bias = nn.Linear(b, a * d), nn.Linear(b, d)

    @torch.no_grad()
    def reset(self, init: Literal["paper", "zero"]) -> None:
        """Hyperfan-in: uniform +-1e-3 sqrt(3 / (b fan)); or the same with U and b_U exactly zero."""
        b = self.mix.out_features
        for layer, fan in ((self.down, self.d), (self.up, self.a), (self.down_bias, 1), (self.up_bias, 1)):
            bound = 1e-3 * (3 / (b * fan)) ** 0.5 if init == "paper" or layer in (self.down, self.down_bias) else 0.0
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def codes(self, q: Tensor, layer: int) -> Tensor:
        """z (G, b) of set codes q (G, q) in a layer."""
        return F.relu(_through(self.mix, torch.cat([q, self.layer_embedding[layer].to(q.dtype).expand(len(q), -1)], 1)))

    def adapters(self, z: Tensor) -> Adapters:
        """The generated weights of z (G, b)."""
        down, up = _through(self.down, z).view(-1, self.d, self.a), _through(self.up, z).view(-1, self.a, self.d)
        return Adapters(down, _through(self.down_bias, z), up, _through(self.up_bias, z))

    def reordered(self, x: Tensor, z: Tensor) -> Tensor:
        """The same for as many z as tokens, without ever holding a generated matrix; (T, d), (T, b) -> (T, d)."""
        x = x.to(z.dtype)
        one = torch.cat([z, z.new_ones(len(z), 1)], 1)  # the last entry carries the biases of the generators
        down = torch.cat([self.down.weight, self.down.bias[:, None]], 1).to(z.dtype).view(self.d, self.a, -1)
        up = torch.cat([self.up.weight, self.up.bias[:, None]], 1).to(z.dtype).view(self.a, self.d, -1)
        h = torch.einsum("tba,tb->ta", (x @ down.transpose(1, 2).reshape(self.d, -1)).view(len(x), -1, self.a), one)
        h = F.relu(h + _through(self.down_bias, z).to(z.dtype))
        return torch.einsum("ta,tb->tab", h, one).reshape(len(x), -1) @ up.transpose(1, 2).reshape(-1, self.d) + _through(self.up_bias, z)


class SetCode(nn.Module):
    """One layer's embedding of the experts and the code of a set of unselected ones."""

    def __init__(self, experts: int, *, e: int = 128, hidden: int = 128, q: int = 128):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(experts, e))
        self.process = nn.Sequential(nn.Linear(e, hidden), nn.ReLU(), nn.Linear(hidden, q))

    def forward(self, chosen: Tensor) -> Tensor:
        """(G, k) chosen experts -> (G, q)."""
        idle = torch.ones(len(chosen), len(self.embedding), dtype=self.embedding.dtype, device=chosen.device).scatter_(1, chosen, 0)
        first, _, second = self.process
        return _through(second, F.relu(_through(first, idle @ self.embedding)))


def distinct(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The different sets of chosen experts (G, k), and which of them each token has (T,)."""
    if index.shape[1] == 1:
        return torch.arange(experts, device=index.device)[:, None], index.flatten()
    index = index.sort(1).values
    if experts ** index.shape[1] >= 1 << 62:
        return index.unique(dim=0, return_inverse=True)
    digits = experts ** torch.arange(index.shape[1], device=index.device)  # a set as one number: unique is then a sort of T numbers
    number, of = (index * digits).sum(1).unique(return_inverse=True)
    return number[:, None] // digits % experts, of


def adapt(x: Tensor, index: Tensor, code: SetCode, hyper: HyperNetwork, layer: int) -> Tensor:
    """The supplementary expert's output (T, d) for x (T, d) and chosen experts index (T, k)."""
    sets, of = distinct(index, len(code.embedding))
    z = hyper.codes(code(sets), layer)
    if len(sets) * hyper.d > len(x) * z.shape[1]:  # a generated (d, a) matrix per set, or (b, a) numbers per token
        return hyper.reordered(x, z.index_select(0, of)).to(x.dtype)
    return hyper.adapters(z)(x, of)


@torch.no_grad()
def table(code: SetCode, hyper: HyperNetwork, layer: int, k: int) -> tuple[Adapters, Tensor]:
    """The adapters of every set of k experts, and the number of a set by its chosen experts: (E,) or, k=2, (E, E)."""
    E = len(code.embedding)
    if k > 2:
        raise UserError(f"{E} experts have too many sets of {k}", "a table is made for top_k 1 and 2", "use the model without one")
    sets = torch.combinations(torch.arange(E, device=code.embedding.device), k)
    number = torch.zeros((E,) * k, dtype=torch.long, device=sets.device)
    every = torch.arange(len(sets), device=sets.device)
    number[tuple(sets.T)] = every
    number[tuple(sets.flip(1).T)] = every
    return hyper.adapters(hyper.codes(code(sets), layer)), number
