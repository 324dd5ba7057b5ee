"""What NACL is measured against, behind the same interface; each once, at the end of the prompt, at the same number of tokens.

- streaming_llm (2309.17453): the first `sinks` tokens and the most recent. Its paper renumbers positions within the cache;
  here they stay the true ones, so a text longer than the model's context is not served.
- h2o (2306.14048): half of the budget by the attention summed over all queries, half the most recent.
- tova (2401.06104): the attention of the last token, mean over the heads of a layer, so all heads keep the same tokens.
- snapkv (2404.14469): the attention of the last `window` tokens, which stay, pooled over neighbours so that whole spans
  stay. Window 32, kernel 7 and max pooling are those of its LongBench runs; the queries of a group are averaged.
- pyramidkv (2406.02069): snapkv with more tokens in early layers and fewer in late ones: in a straight line from
  2 n - n/beta to n/beta beyond the window. The official code rounds each step down and ends below the budget; here the mean
  over layers is the budget.
- key_norm (2406.11430): the keys of the smallest norm.
- random: drawn evenly, different in each head and layer.

The papers of streaming_llm, h2o and tova go on evicting while they answer; here nothing is evicted then.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from modelwright.cache.engine.method import Method, Read
from modelwright.core.errors import UserError
from modelwright.core.knobs import knob


@dataclass(frozen=True)
class StreamingLLM(Method):
    sinks: int = knob(4, "first tokens that stay", low=0)
    name: ClassVar[str] = "streaming_llm"

    def protected(self, read: Read) -> int:
        return self.sinks

    def score(self, read: Read) -> Tensor:
        return read.position.float().masked_fill(read.at_the_ends(self.sinks, 0), torch.inf)


@dataclass(frozen=True)
class H2O(Method):
    recent: float = knob(0.5, "share of the budget for the last tokens", low=0, high=1)
    name: ClassVar[str] = "h2o"

    def window(self, length: int) -> int:
        return length

    def score(self, read: Read) -> Tensor:
        last = np.rint(self.recent * read.counts).astype(int)
        return read.received(read.q.shape[2]).masked_fill(read.at_the_ends(0, last), torch.inf)


@dataclass(frozen=True)
class TOVA(Method):
    name: ClassVar[str] = "tova"

    def protected(self, read: Read) -> int:
        return 1

    def score(self, read: Read) -> Tensor:
        return read.received(1).mean(1, keepdim=True).masked_fill(read.at_the_ends(0, 1), torch.inf)


@dataclass(frozen=True)
class SnapKV(Method):
    observe: int = knob(32, "tokens at the end whose attention counts, and which stay", low=1)
    kernel: int = knob(7, "neighbours that are pooled, an odd number", low=1)
    pooling: Literal["max", "mean"] = knob("max", "how they are pooled")
    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kernel % 2:
            raise UserError(f"kernel={self.kernel} does not fit {self.name}", "the kernel is odd", f"give {self.kernel + 1}")

    def window(self, length: int) -> int:
        return self.observe

    def protected(self, read: Read) -> int:
        return self.observe

    def score(self, read: Read) -> Tensor:
        pool, aside = (max_pool1d if self.pooling == "max" else avg_pool1d), self.kernel // 2
        votes = read.received(self.observe)[..., : -self.observe]
        pooled = pool(votes, self.kernel, 1, aside) if votes.shape[-1] else votes
        return torch.nn.functional.pad(pooled, (0, self.observe), value=torch.inf)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    beta: float = knob(20, "the last layer's share of the mean, 1 / beta", low=1)
    name: ClassVar[str] = "pyramidkv"

    def counts(self, real: np.ndarray, layer: int, layers: int) -> np.ndarray:
        mean = super().counts(real, layer, layers) - self.observe  # beyond the window
        least = mean / self.beta
        most = np.minimum(2 * mean - least, real - self.observe)  # a layer cannot keep more than there is
        least = 2 * mean - most
        own = np.rint(most - (most - least) * (layer / max(layers - 1, 1))) if layers > 1 else mean
        return np.where(mean > 0, np.clip(own + self.observe, 1, real), mean + self.observe).astype(int)


@dataclass(frozen=True)
class KeyNorm(Method):
    name: ClassVar[str] = "key_norm"

    def score(self, read: Read) -> Tensor:
        return -read.shared(read.k.float().norm(dim=-1))


@dataclass(frozen=True)
class Random(Method):
    seed: int = knob(0, "of the draw")
    name: ClassVar[str] = "random"

    def score(self, read: Read) -> Tensor:
        return read.noise(self.seed)
