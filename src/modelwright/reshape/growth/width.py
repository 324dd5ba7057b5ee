"""Width: how the rows and columns of every matrix grow when the residual stream, the heads or the feed-forward part do.

A unit is an axis position: one of the residual stream, a whole attention head, a feed-forward neuron. Two schemes:

copy (Net2Net, 1511.05641; bert2BERT): new unit j repeats unit map[j]. What writes units is copied, what reads them is divided by
    the number of copies, so that the sum is the same. RMSNorm and LayerNorm see the same mean only if every unit of the residual
    stream has as many copies, so the stream grows by whole factors. Where embeddings and head are one matrix, it cannot be copied
    and divided at once: the final norm's gain is divided instead.
pad (LEMON, 2310.07999): new units of the stream carry 0 (with LayerNorm: the mean of the others), new heads and neurons are drawn
    and read with weight 0. Their part of the norm's mean is undone by the gain, times sqrt(n / n'), and by the epsilon, times n / n'.

mask (MSG, 2305.02869): padding with random values everywhere; tune.masked hides the new units and opens them while it trains.

Copies that are alike would get like gradients for ever. `noise` moves weight between the two columns that read a pair of copies:
B + e and B - e, e = B * noise * u with u drawn for each value. The sum is exact in every floating-point type (the larger column is
rounded, the smaller is the rest, which has no rounding error), and the copies are told apart. This is ours.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modelwright.core.model.anatomy import Part

_CHUNK = 256  # rows that are worked on at a time, so that memory holds one grown matrix and little more

# role -> (axis of the outputs, axis of the inputs)
AXES = {
    "embed": ("hidden", ""),
    "position": ("hidden", ""),
    "head": ("", "hidden"),
    "attn.q": ("q", "hidden"),
    "attn.k": ("kv", "hidden"),
    "attn.v": ("kv", "hidden"),
    "attn.o": ("hidden", "q"),
    "ffn.gate": ("ffn", "hidden"),
    "ffn.up": ("ffn", "hidden"),
    "ffn.down": ("hidden", "ffn"),
    "norm.attn": ("hidden", ""),
    "norm.ffn": ("hidden", ""),
    "norm.final": ("hidden", ""),
    "norm.q": ("", ""),
    "norm.k": ("", ""),
}
FUSED = {"attn.qkv": {"q": "attn.q", "k": "attn.k", "v": "attn.v"}, "ffn.gate_up": {"gate": "ffn.gate", "up": "ffn.up"}}


@dataclass(frozen=True)
class Axis:
    """One axis: n units become `n2`; each unit is `size` rows (a head's width, else 1). `scheme`: tile, repeat or pad."""

    n: int
    n2: int
    size: int = 1
    scheme: str = "tile"

    @cached_property
    def units(self) -> Tensor:
        """The source of each new unit, (n',); -1 for a new one."""
        new = torch.arange(self.n2)
        if self.scheme == "pad":
            return torch.where(new < self.n, new, -1)
        return new * self.n // self.n2 if self.scheme == "repeat" else new % self.n

    @cached_property
    def rows(self) -> Tensor:
        """The source row of each new row."""
        return self._rows_of(self.units)

    @cached_property
    def copies(self) -> Tensor:
        """How many copies the source of each new unit has, (n',)."""
        if self.scheme == "pad":
            return torch.ones(self.n2, dtype=torch.long)
        return torch.bincount(self.units, minlength=self.n)[self.units]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """New rows that share a source, two and two; of an odd number of copies the last is left out."""
        if self.scheme == "pad":
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        order = self.units.argsort(stable=True)  # copies side by side
        count = torch.bincount(self.units, minlength=self.n)
        place = torch.arange(self.n2) - (count.cumsum(0) - count)[self.units[order]]  # of each among its copies
        first = (place % 2 == 0) & (place + 1 < count[self.units[order]])
        at = first.nonzero().flatten()
        return self._rows_of(order[at]), self._rows_of(order[at + 1])

    def _rows_of(self, units: Tensor) -> Tensor:
        return (units[:, None] * self.size + torch.arange(self.size)).where(units[:, None] >= 0, torch.tensor(-1)).flatten()


@dataclass(frozen=True)
class Width:
    """The grown axes by name (hidden, q, kv, ffn), and what the norms and new values need to know."""

    axes: dict[str, Axis]
    noise: float
    std: float  # of new random values
    tied: bool  # embeddings and head are one matrix
    layer_norm: bool  # the norms subtract the mean
    seed: int
    random: bool = False  # new units write and read random values: something else hides them

    @property
    def pads(self) -> bool:
        return self.axes["hidden"].scheme == "pad"

    @property
    def ratio(self) -> float:
        return self.axes["hidden"].n2 / self.axes["hidden"].n

    def exact_in_halves(self) -> bool:
        """Whether every factor is a power of two, so that 16-bit weights hold the result without rounding."""
        if not self.pads:
            return all(math.log2(c).is_integer() for a in self.axes.values() for c in a.copies.unique().tolist())
        return self.ratio == 1 or math.log2(self.ratio) % 2 == 0 and not self.layer_norm

    def grow(self, tensor: Tensor, part: Part) -> Tensor:
        """A parameter in its new width, in its own type."""
        if part.orientation == "in_out":
            return self._matrix(tensor.T, part).T if tensor.dim() > 1 else self._matrix(tensor, part)
        return self._matrix(tensor, part)

    def _matrix(self, t: Tensor, part: Part) -> Tensor:
        if part.role in FUSED:
            pieces = [torch.cat([t[s] for s in rows]) for rows in part.rows.values()]
            return torch.cat([self._piece(p, FUSED[part.role][k], f"{part.name}.{k}") for k, p in zip(part.rows, pieces, strict=True)])
        if part.orientation == "table":  # (V, d): the columns are what is written
            return self._piece(t.T, part.role, part.name).T
        if part.orientation == "vector" and part.role.startswith("norm"):
            return self._gain(t, part)
        return self._piece(t, part.role, part.name)

    def _gain(self, t: Tensor, part: Part) -> Tensor:
        out = AXES[part.role][0]
        if not out:
            return t
        axis, grown = self.axes[out], t.float()
        if self.pads:
            scale = 1.0 if self.random or part.kind == "bias" else 1 / math.sqrt(self.ratio)
            grown, fill = grown * scale, scale if part.kind == "weight" else 0.0
            return torch.cat([grown, grown.new_full((axis.n2 - axis.n,), fill)]).to(t.dtype)
        grown = grown[axis.rows]
        return (grown / self.ratio if part.role == "norm.final" and self.tied else grown).to(t.dtype)

    def _piece(self, t: Tensor, role: str, name: str) -> Tensor:
        """(out, in) or (out,): the outputs grow, then the inputs."""
        out, into = AXES[role]
        if out in self.axes:
            t = self._written(t, self.axes[out], out, name)
        if into in self.axes and t.dim() > 1:
            t = self._read(t, self.axes[into], into, name)
        return t

    def _written(self, t: Tensor, axis: Axis, kind: str, name: str) -> Tensor:
        if axis.scheme != "pad":
            return t[axis.rows]
        extra = (axis.n2 - axis.n) * axis.size
        shape = (extra, *t.shape[1:])
        if kind != "hidden" or self.random:  # new heads and neurons; a bias starts at 0
            new = self._draw(shape, f"{name}.rows", t.dtype) if t.dim() > 1 else t.new_zeros(shape)
        elif self.layer_norm:
            new = t.float().mean(0, keepdim=True).expand(shape).to(t.dtype)
        else:
            new = t.new_zeros(shape)
        return torch.cat([t, new])

    def _read(self, t: Tensor, axis: Axis, kind: str, name: str) -> Tensor:
        if axis.scheme == "pad":
            shape = (t.shape[0], (axis.n2 - axis.n) * axis.size)
            new = self._draw(shape, f"{name}.columns", t.dtype) if kind == "hidden" or self.random else t.new_zeros(shape)
            return torch.cat([t, new], 1)
        share = axis.copies.float().repeat_interleave(axis.size)
        g = self._generator(f"{name}.noise")
        return torch.cat([self._divided(rows, axis, share, g) for rows in t.split(_CHUNK)])

    def _divided(self, t: Tensor, axis: Axis, share: Tensor, g: torch.Generator) -> Tensor:
        """Columns copied and divided by their number of copies; of each pair one gets a little more and the other as much less."""
        out = (t.float()[:, axis.rows] / share).to(t.dtype)
        one, two = axis.pairs
        if not self.noise or not len(one):
            return out
        u = torch.rand((len(t), len(one)), generator=g) * 2 - 1
        half = out[:, one].float()
        larger = (half * (1 + self.noise * u.abs())).to(t.dtype)
        smaller = (2 * half - larger.float()).to(t.dtype)
        out[:, one], out[:, two] = torch.where(u > 0, larger, smaller), torch.where(u > 0, smaller, larger)
        return out

    def _draw(self, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=self._generator(name)) * self.std).to(dtype)

    def _generator(self, name: str) -> torch.Generator:
        return generator(self.seed, name)


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of a tensor's own, so that the bytes do not depend on the order of the stream."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
