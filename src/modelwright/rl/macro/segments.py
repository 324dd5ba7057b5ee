"""Where a macro action begins: n-grams, random lengths, falling perplexity, sentences. All rows of a batch at once.

Everything here is (B, T): position t stands for the token that is predicted there. `mask` marks the response, in one run a row. A segmenter
says at which positions an action begins; `numbered` makes numbers of it: 0, 1, 2 ... along a response and -1 elsewhere. The last token is
always an action of its own, as in the official code, so that the reward of the whole response is shared with no other token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 5, 10)  # of the random macro actions


@dataclass
class Responses:
    """What a segmenter may look at."""

    mask: Tensor  # (B, T) bool
    tokens: Tensor  # (B, T) the predicted tokens
    logp: Tensor  # (B, T) their log-probabilities under the frozen reference
    keys: list[tuple[int, ...]]  # B seeds, one a response

    @property
    def index(self) -> Tensor:
        """Number of each token within its response, (B, T); 0 before it."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def numbered(begins: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the macro actions, (B, T), -1 outside the response. First and last token begin one whatever `begins` says."""
    empty = torch.zeros_like(mask[:, :1])
    first = mask & ~torch.cat([empty, mask[:, :-1]], 1)
    last = mask & ~torch.cat([mask[:, 1:], empty], 1)
    begins = (begins | first | last) & mask
    return torch.where(mask, begins.cumsum(1) - 1, -1)


def ngram(r: Responses, n: int) -> Tensor:
    """An action begins after every n tokens."""
    return r.index % n == 0


def drawn(r: Responses, repeats: int) -> Tensor:
    """Lengths 1, 2, 3, 5 and 10, each `repeats` times, in random order; what is left of a response is one action."""
    lengths = np.repeat(LENGTHS, repeats)
    order = np.stack([np.random.default_rng(k).permutation(len(lengths)) for k in r.keys])
    ends = torch.from_numpy(lengths[order]).cumsum(1).to(r.mask.device)  # (B, 5 repeats): where the next action begins
    longest = r.mask.shape[1]
    begins = torch.zeros(len(r.mask), longest + 1, dtype=torch.bool, device=r.mask.device)
    begins.scatter_(1, ends.clamp(max=longest), True)
    return begins.gather(1, r.index) | (r.index == 0)


def perplexity(r: Responses, official: bool = False) -> Tensor:
    """An action goes on as long as the perplexity of its tokens under the reference falls; the token that rises begins the next one.

    The official code begins the next one a token earlier, at the token before the rise.
    """
    surprise = -r.logp
    rises = torch.zeros_like(r.mask)
    rises[:, 1:] = (surprise[:, 1:] > surprise[:, :-1]) & r.mask[:, 1:] & r.mask[:, :-1]
    return torch.cat([rises[:, 1:], torch.zeros_like(rises[:, :1])], 1) if official else rises


class Sentences:
    """An action begins with each sentence (after . ! ? and white space, or after a line end) and after each `cutoff` tokens of it.

    Ours, in the place of the paper's constituency trees: the two rules need no parser and no language.
    """

    def __init__(self, tokenizer: Any, cutoff: int):
        self.cutoff = cutoff
        count = max(tokenizer.get_vocab().values()) + 1
        # A tokenizer may strip the space of a first token, so each is decoded behind another one.
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        head = len(tokenizer.decode(before))
        texts = [t[head:] for t in tokenizer.batch_decode([[*before, i] for i in range(count)])]
        closed = [t.rstrip("\"')]") for t in texts]
        self.stops = torch.tensor([c.endswith((".", "!", "?")) for c in closed])  # ends a sentence where white space follows
        self.space = torch.tensor([t[:1].isspace() for t in texts])
        whole = [t.rstrip(" ") != t and t.rstrip().endswith((".", "!", "?")) for t in texts]
        self.ends = torch.tensor([w or t.rstrip(" ").endswith("\n") for w, t in zip(whole, texts, strict=True)])  # ends one by itself

    def __call__(self, r: Responses) -> Tensor:
        stops, space, ends = (t.to(r.tokens.device)[r.tokens] for t in (self.stops, self.space, self.ends))
        sentence = torch.zeros_like(r.mask)
        sentence[:, 1:] = ends[:, :-1] | (stops[:, :-1] & space[:, 1:])
        sentence = (sentence & r.mask) | (r.index == 0)
        since = r.index - torch.where(sentence, r.index, 0).cummax(1).values
        return since % self.cutoff == 0


@dataclass(frozen=True)
class Segmenter:
    """A way to part responses, by its name; gives the numbers of the macro actions, (B, T)."""

    kind: str
    n: int = 5
    repeats: int = 3
    official: bool = False
    sentences: Sentences | None = None

    def __call__(self, r: Responses) -> Tensor:
        if self.kind == "token":
            return numbered(r.mask, r.mask)
        if self.kind == "random":
            return numbered(drawn(r, self.repeats), r.mask)
        if self.kind == "perplexity":
            return numbered(perplexity(r, self.official), r.mask)
        if self.kind == "parse":
            assert self.sentences is not None
            return numbered(self.sentences(r), r.mask)
        found = numbered(ngram(r, self.n), r.mask)
        if self.official:  # its list of boundaries then holds the last one twice: an empty action stands before the last
            last = r.mask & (r.index == r.mask.sum(1, keepdim=True) - 1)
            found = found + (last & (r.index > 0) & (r.index % self.n == 0))
        return found


# ---- rewards, values and advantages over macro actions ------------------------------------------------------------------
def weights(actions: Tensor, how: str) -> Tensor:
    """Each token's share sigma in the value of its macro action, (B, T); the shares of an action sum to 1.

    equal: 1 / length. unit: the last token alone. position: in proportion to 1 / (place in the action).
    """
    inside = actions >= 0
    if how == "unit":
        following = torch.cat([actions[:, 1:], torch.full_like(actions[:, :1], -1)], 1)
        return (inside & (following != actions)).float()
    raw = inside.float()
    if how == "position":
        at = torch.arange(actions.shape[1], device=actions.device).expand_as(actions)
        previous = torch.cat([torch.full_like(actions[:, :1], -2), actions[:, :-1]], 1)
        begin = torch.where(actions != previous, at, 0).cummax(1).values
        raw = raw / (at - begin + 1)
    return raw / spread(summed(raw, actions), actions).clamp(min=1e-12)


def summed(values: Tensor, actions: Tensor) -> Tensor:
    """Sums over each macro action, (B, S) with S the largest number of actions; 0 where a row has fewer."""
    size = max(int(actions.max()) + 1, 1)
    sums = values.new_zeros(len(values), size + 1)  # the last column takes what lies outside
    return sums.scatter_add_(1, torch.where(actions >= 0, actions, size), values)[:, :size]


def spread(per_action: Tensor, actions: Tensor) -> Tensor:
    """The value of each token's macro action, (B, T); 0 outside."""
    return per_action.gather(1, actions.clamp(min=0)) * (actions >= 0)


def advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (1506.02438) over macro actions, all (B, S); rewards and values are 0 where a row has ended."""
    found = torch.zeros_like(values)
    later = values.new_zeros(len(values))
    for s in reversed(range(values.shape[1])):
        following = values[:, s + 1] if s + 1 < values.shape[1] else 0.0
        later = rewards[:, s] + gamma * following - values[:, s] + gamma * lam * later
        found[:, s] = later
    return found
