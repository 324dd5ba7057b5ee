"""What a way to evict is: scores for the tokens of a prompt, and a budget.

A method is a frozen dataclass with `score(read) -> (B, G, T)`; the highest scores are kept, as many as the budget says.
Tokens that must stay score infinity. `keep` is a share of the real tokens of each row, `tokens` a number; both may be given
per layer (a list) or per layer and key-value head (a list of lists). Protected tokens count. The other fields are the method's
own settings: a type that is annotated, and the bounds of `knob`, are checked wherever one is made.
"""

import math
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.knobs import type_name

_ON_CPU, _ELSEWHERE = 1 << 19, 1 << 27  # attention weights at a time: few, for the processor's cache, but in matrices of 32 queries or more


def highest(score: Tensor, counts: Tensor) -> Tensor:
    """Which columns of score (B, G, T) are the `counts` (B or 1, G or 1, 1) highest of their row; of equal ones the first. (B, G, T)."""
    score = score.masked_fill(score.isnan(), -torch.inf)
    if (n := int(counts.max())) == int(counts.min()):
        least = score.kthvalue(score.shape[2] - n + 1, keepdim=True).values
    else:
        least = score.sort(descending=True).values.gather(2, (counts - 1).expand(*score.shape[:2], 1))
    above, equal = score > least, score == least
    return above | equal & (equal.cumsum(2) <= counts - above.sum(2, keepdim=True))


@dataclass
class Read:
    """What one layer has when the prompt is read: H query heads, K key-value heads, T tokens. The cache holds G heads: K, or 1 where
    it is a latent of them all."""

    q: Tensor  # (B, H, w, d) the last queries, after rotation and norms
    k: Tensor  # (B, K, T, d)
    v: Tensor  # (B, K, T, d of its own)
    scale: float
    layer: int  # among the layers that are evicted
    layers: int
    lengths: list[int] | None = None  # real tokens of each row; None: no padding
    softcap: float | None = None
    held: int | None = None  # heads that the cache holds, G; None: K
    block: int | None = None  # queries at a time; None: by what a processor's cache holds
    counts: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), int))  # (B or 1, G or 1) tokens to keep
    attend: bool = False  # whether `received` is to leave what its queries attend to,
    attended: Tensor | None = None  # (B, K, H / K, queries, d of v): attention has them in hand, and need not compute them again

    @property
    def heads(self) -> int:
        return self.held or self.k.shape[1]

    def shared(self, score: Tensor) -> Tensor:
        """A score of each key (B, K, T), summed over the heads that the cache holds as one: (B, G, T)."""
        return score.unflatten(1, (self.heads, -1)).sum(2)

    @property
    def real(self) -> np.ndarray:
        """Real tokens of each row, (B or 1, 1)."""
        return np.array(self.lengths or [self.k.shape[2]])[:, None]

    @cached_property
    def position(self) -> Tensor:
        """Position of each column in its row, negative where padded: (B or 1, 1, T)."""
        return torch.arange(self.k.shape[2], device=self.k.device) - (self.k.shape[2] - self.tensor(self.real))

    def tensor(self, values: np.ndarray) -> Tensor:
        """Numbers per row and head, (B or 1, G or 1), as a tensor that broadcasts over (B, G, T)."""
        return torch.as_tensor(values, device=self.k.device)[..., None]

    def at_the_ends(self, first: np.ndarray | int, last: np.ndarray | int) -> Tensor:
        """Which columns are among the first or the last so many of their row: (B or 1, G or 1, T)."""
        first, last = np.atleast_2d(first), np.atleast_2d(last)
        return (self.position >= 0) & ((self.position < self.tensor(first)) | (self.position >= self.tensor(self.real - last)))

    def received(self, queries: np.ndarray | int, causal: bool = True) -> Tensor:
        """Attention that each token gets from the last `queries` ones (a number, or one per row and head), summed over them and over
        the heads of a group: (B, G, T)."""
        (B, H, _, _), (K, T), device = self.q.shape, self.k.shape[1:3], self.k.device
        wanted = self._wanted(queries)  # (B or 1, K or 1)
        most, group = int(wanted.max()), H // K
        received = torch.zeros(B, K, T, device=device)
        if self.attend and causal:
            self.attended = self.v.new_empty(B, K, group, most, self.v.shape[3])  # values may have a width of their own
        step = self.block or max(32, (_ON_CPU if device.type == "cpu" else _ELSEWHERE) // (B * H * T))
        room = torch.empty(B * H * min(step, most) * T, device=device)  # one for all blocks: fresh memory costs more than a product

        for first in range(T - most, T, step):  # position of a block's first query
            last = min(first + step, T)
            weights = self._weights(first, last, causal, room)  # (B, K, H / K * queries, keys)
            keys = weights.shape[3]
            counted = torch.arange(first, last, device=device) >= T - self.tensor(wanted)  # (B or 1, K or 1, queries)
            counted = counted.float().repeat(1, 1, group).expand(B, K, -1)[:, :, None]
            received[..., :keys] += (counted @ weights)[:, :, 0]
            if self.attended is not None:
                given = weights.to(self.v.dtype) @ self.v[:, :, :keys]
                at = slice(first - T + most, last - T + most)
                self.attended[..., at, :] = given.view(B, K, group, last - first, -1)
        return self.shared(received)

    def _wanted(self, queries: np.ndarray | int) -> np.ndarray:
        """How many of the last queries count for each row and key-value head, (B or 1, K or 1); a padded query sees nothing."""
        K, window = self.k.shape[1], self.q.shape[2]
        wanted = np.minimum(np.atleast_2d(queries), np.minimum(self.real, window))
        return wanted.repeat(K // self.heads, 1) if wanted.shape[1] > 1 else wanted

    def _weights(self, first: int, last: int, causal: bool, room: Tensor) -> Tensor:
        """Attention weights (B, K, H / K * n, keys) in fp32 of the n queries at the positions first to last, written into `room`.

        causal: a query sees no later key, so keys after the block are left out; else there are T of them."""
        (B, H, window, d), (K, T), n = self.q.shape, self.k.shape[1:3], last - first
        keys, least = last if causal else T, torch.finfo(torch.float32).min
        q = self.q[:, :, first - T + window : last - T + window] * self.scale
        q = q.reshape(B, K, H // K * n, d)
        scores = room[: B * H * n * keys].view(B, K, H // K * n, keys)
        if q.dtype == scores.dtype:
            torch.matmul(q, self.k[:, :, :keys].transpose(2, 3), out=scores)
        else:
            scores.copy_(q @ self.k[:, :, :keys].transpose(2, 3))
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if causal:  # every query of the block sees all keys before the block
            later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            scores.view(B, K, H // K, n, keys)[..., first:].masked_fill_(later, least)
        if self.lengths:
            scores.masked_fill_(self.position[..., None, :keys] < 0, least)
        return torch.softmax(scores, -1, out=scores)

    def noise(self, seed: int) -> Tensor:
        """Uniform draws (B or 1, G, T) for this layer. They belong to a token's place in its row, so that neither the batch nor
        its padding changes what is drawn, and beams of one prompt agree; no global generator is touched."""
        T, G = self.k.shape[2], self.heads
        generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) % 2**63)
        u = torch.rand(T, G, generator=generator).to(self.k.device)  # (T, G): its beginning does not depend on T
        return u[self.position[:, 0].clamp(min=0)].transpose(1, 2)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a setting's type."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is(value, k) for k in get_args(kind))
    if kind in (int, float):
        return not isinstance(value, bool) and (
            isinstance(value, Integral) or kind is float and isinstance(value, Real) and math.isfinite(value)
        )
    return not isinstance(kind, type) or isinstance(value, kind)


@dataclass(frozen=True)
class Method(ABC):
    """The budget that all methods share."""

    keep: Any = 0.5
    tokens: Any = None
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        given = self._array("keep", self.keep)
        if not ((given > 0) & (given <= 1)).all():
            raise UserError(f"keep={self.keep} is out of range", "it is the share of the prompt that stays", "give more than 0, at most 1")
        if self.tokens is not None and not (self._array("tokens", self.tokens) >= 1).all():
            raise UserError(f"tokens={self.tokens} is out of range", "it is how many tokens of the prompt stay", "give 1 or more")
        kinds = get_type_hints(type(self))
        for f in fields(self):
            if f.name not in ("keep", "tokens"):
                self._check(f.name, getattr(self, f.name), kinds[f.name], f.metadata.get("low"), f.metadata.get("high"))

    def _check(self, name: str, value: Any, kind: Any, low: float | None, high: float | None) -> None:
        how = "change it, or leave it out"
        if not _is(value, kind):
            raise UserError(f"{name}={value!r} does not fit {self.name}", f"it must be {type_name(kind)}", how)
        if value is not None and (low is not None and value < low or high is not None and value > high):
            span = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{name}={value} is out of range for {self.name}", f"it must be {span}", how)

    @staticmethod
    def _array(name: str, value: Any) -> np.ndarray:
        try:
            return np.asarray(value, dtype=float)
        except (TypeError, ValueError):
            raise UserError(
                f"{name}={value!r} is no budget", "it is one number, one per layer, or one per layer and key-value head, all alike"
            ) from None

    def fits(self, layers: int, heads: int) -> None:
        """UserError unless the budget has as many layers and heads as the model."""
        for name, value in (("keep", self.keep), ("tokens", self.tokens)):
            shape = np.shape(value)
            if shape[:1] not in ((), (layers,)) or shape[1:] not in ((), (1,), (heads,)):
                raise UserError(
                    f"{name} has shape {' x '.join(map(str, shape))}",
                    f"the model has {layers} layers to evict from and {heads} key-value heads",
                    "give one number, one per layer, or one per layer and head",
                )

    def counts(self, real: np.ndarray, layer: int, layers: int) -> np.ndarray:
        """Tokens to keep of `real` (B or 1, 1) ones: (B or 1, G or 1), at least 1 and at most all."""
        value = self._array("keep", self.keep) if self.tokens is None else self._array("tokens", self.tokens)
        own = np.atleast_1d(value[layer] if value.ndim else value)[None]  # (1, G or 1)
        return np.clip(np.rint(own * real if self.tokens is None else own), 1, real).astype(int)

    def window(self, length: int) -> int:
        """How many of the last queries `score` wants, of a prompt of `length` tokens."""
        return 1

    def protected(self, read: Read) -> np.ndarray | int:
        """How many tokens are sure to stay: (B or 1, G or 1)."""
        return 0

    @abstractmethod
    def score(self, read: Read) -> Tensor:
        """(B, G, T): the higher, the sooner kept."""

    def choose(self, read: Read) -> tuple[Tensor | None, Tensor | None]:
        """Positions to keep (B, G, n) in ascending order and which of them are real (B, G, n); None: all of them.

        Raises UserError where the budget does not hold what the method protects."""
        read.counts = counts = self.counts(read.real, read.layer, read.layers)
        B, G, T = read.k.shape[0], read.heads, read.k.shape[2]
        if counts.shape[1] not in (1, G):
            raise UserError("the budget differs between heads", "the cache holds all heads as one", "give one number, or one per layer")
        if (counts >= T).all():
            return None, None
        kept, least = np.broadcast_arrays(counts, np.asarray(self.protected(read)))
        if (short := (kept < least) & (kept < read.real)).any():
            n, need = kept[short][0], least[short][0]
            raise UserError(
                f"the budget of {self.name} is {n} tokens and it protects {need}",
                f"the prompt has {int(read.real.min())} tokens",
                "keep more, protect fewer, or give a longer prompt",
            )
        score = self.score(read).expand(B, G, T)
        if read.lengths:
            score = score.masked_fill(read.position < 0, -torch.inf)
        chosen = highest(score, read.tensor(counts))
        columns = chosen.nonzero()[:, 2]  # row by row, ascending
        n = int(counts.max())
        if (counts == n).all():
            return columns.view(B, G, n), None
        slots = (torch.arange(n, device=score.device) < read.tensor(counts)).expand(B, G, n)
        return columns.new_full((B, G, n), T - 1).masked_scatter_(slots, columns), slots
