"""NACL (2408.03675, ACL 2024): evict once, at the end of encoding, by what the question looks at and by chance.

Use it for long prompts with short answers. Per layer and key-value head, of a prompt of p tokens with the budget n:

1. The last tokens, where the question stands, are proxies P: F_j = sum over i in P of softmax_j(q_i k_j / sqrt(d)).
2. The first and the most recent tokens are protected and stay.
3. Proxy eviction keeps the C_p others with the highest F.
4. Random eviction keeps C_r more, drawn without replacement with the probabilities softmax(F) over the rest. It keeps tokens
   that no proxy looks at yet, and different ones in each head: a token survives in one of H heads with 1 - (1 - n/p)^H.

The paper's: the above and its table of shares for budgets of 10, 20 and 30 % of the prompt (`TABLE`), which are the defaults;
between them they are interpolated, outside the nearest row holds. The paper also evicts every m tokens while answering, the
official code does not and neither do we.

The draw is made in one batched operation: the C_r highest of F + Gumbel noise have the distribution of drawing one after the
other (Plackett-Luce), tested against enumeration. The noise belongs to the seed, layer, head and position, so that a prompt
keeps the same tokens in any batch, and in all of its beams.

The official code (PaddlePaddle/Research) runs on one sequence in a loop over heads with numpy's global state, and has faults
that are not copied: `recent = int(0.01 p) - 256` is negative below 25,600 tokens and slices wrongly; query head j is read for
key-value head j, also where heads are grouped (here a group's queries are summed); proxies see all keys, also later ones.
`compat="official"` takes its shares (kept 1 + 12 + 7 % of the prompt, no eviction up to 2,048 tokens), its proxies (the last
int(1 %) tokens, to which protected ones add none; they see all keys), and its 256 first tokens where 1 % of the prompt is more
than that. Ours: below, half of what is protected stands first, at most 256, and half last.

It fails where the answer is one of many alike and the question comes after the eviction, or the budget is small: with 80 %
evicted, retrieval of keys and values collapses from 0.592 to 0.036 in the official results, where the mean of the other
tasks hardly moves (0.371 to 0.368).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from modelwright.cache.engine.method import Method, Read, highest
from modelwright.core.errors import UserError
from modelwright.core.knobs import knob

# budget -> protected, proxies that are not protected, kept by the proxies, drawn at random; in % of the prompt
TABLE = {10: (1, 3, 2, 7), 20: (2, 18, 6, 12), 30: (1.5, 20, 10.5, 18)}


@dataclass(frozen=True)
class NACL(Method):
    """Shares that are not given are the paper's for the budget. `protect` and `random` are shares of the budget, `proxies` one of
    the prompt; the protected last tokens are proxies too."""

    keep: float | list = 0.2
    protect: float | None = knob(None, "share of the budget that is protected", low=0, high=1)
    random: float | None = knob(None, "share of the budget that is drawn", low=0, high=1)
    proxies: float | None = knob(None, "share of the prompt whose attention counts", low=0, high=1)
    sinks: int = knob(256, "first tokens that are protected, at most", low=0)
    seed: int = knob(0, "of the draw")
    compat: Literal["none", "official"] = knob("none", "shares and faults of the official code")
    name: ClassVar[str] = "nacl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.protect or 0) + (self.random or 0) > 1:
            raise UserError(f"protect={self.protect} and random={self.random} are more than the budget", how="let them sum to at most 1")

    def shares(self, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Protected and random shares of the budget, and further proxies as a share of the prompt, for a budget as a share."""
        if self.compat == "official":
            found = [np.full_like(budget, x) for x in (1 / 20, 7 / 20, 0.01)]
        else:
            found = [np.interp(budget, np.array(list(TABLE)) / 100, column) for column in _COLUMNS]
        own = (self.protect, self.random, self.proxies)
        return tuple(f if o is None else np.full_like(budget, o) for f, o in zip(found, own, strict=True))  # type: ignore[return-value]

    def counts(self, real: np.ndarray, layer: int, layers: int) -> np.ndarray:
        found = super().counts(real, layer, layers)
        return np.where(real <= 2048, real, found) if self.compat == "official" else found

    def split(self, kept: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Whole tokens: first, last, chosen by the proxies, and how many of the last are proxies."""
        protect, random, proxies = self.shares(kept / real)
        guarded = np.minimum(np.maximum(np.rint(protect * kept), 1), kept).astype(int)
        first = np.minimum(guarded // 2, self.sinks)
        if self.compat == "official":
            first = np.where(guarded > self.sinks, self.sinks, first)
        chosen = kept - guarded - np.minimum(np.rint(random * kept), kept - guarded).astype(int)
        last = guarded - first
        queries = (proxies * real).astype(int) if self.compat == "official" else np.rint(proxies * real).astype(int) + last
        return first, last, chosen, np.maximum(queries, 1)

    def window(self, length: int) -> int:
        """The most proxies of any layer and head."""
        real = np.array([[length]])
        layers = max(len(np.atleast_1d(self.keep)), len(np.atleast_1d(self.tokens)))
        return max(int(self.split(self.counts(real, i, layers), real)[3].max()) for i in range(layers))

    def score(self, read: Read) -> Tensor:
        first, last, chosen, proxies = self.split(read.counts, read.real)
        F = read.received(proxies, causal=self.compat != "official")
        if read.lengths:
            F = F.masked_fill(read.position < 0, -torch.inf)
        F = F.masked_fill(read.at_the_ends(first, last), torch.inf)
        top = highest(F, read.tensor(first + last + chosen))
        return torch.where(top, torch.inf, F - torch.log(-torch.log(read.noise(self.seed))))


_COLUMNS = (
    [row[0] / budget for budget, row in TABLE.items()],
    [row[3] / budget for budget, row in TABLE.items()],
    [row[1] / 100 for row in TABLE.values()],
)


def retention(keep: float, heads: int) -> float:
    """Probability that a token stays in at least one of `heads` heads which draw independently: 99.92 % for 32 heads and a fifth."""
    return 1 - (1 - keep) ** heads


def averages(rows: Mapping[str, Collection[float]], without: Collection[str] = ()) -> list[float]:
    """Plain means over the tasks of a result table, column by column."""
    return np.mean([list(v) for k, v in rows.items() if k not in without], axis=0).tolist()


def budget_table(prompt: int = 1000) -> dict[int, dict[str, float]]:
    """The paper's table of shares in % of the prompt, read back from the whole tokens that a prompt of that length gets."""
    real, table = np.array([[prompt]]), {}
    for percent in TABLE:
        method = NACL(keep=percent / 100)
        kept = method.counts(real, 0, 1)
        first, last, chosen, proxies = (x.item() for x in method.split(kept, real))
        random = kept.item() - first - last - chosen
        parts = {"protect": first + last, "noprotect_proxy": proxies - last, "proxy": chosen, "random": random}
        table[percent] = {name: 100 * n / prompt for name, n in parts.items()}
    return table
