"""Long contexts made on the spot, scored exactly: what is asked for either comes out or does not.

- recall: k v k v ... k v; asked for one key, the answer is its value (associative recall, 2009.06041, 2312.04927).
- passkey: noise that hides a mark and four digits somewhere; asked for the mark, the answer is the digits (2305.16300).
- retrieval: pairs of a two-token key and a two-token value; asked for a key, the answer is its value (KV retrieval, 2307.03172).
- copy: noise; the answer is how it begins.

Where the question is part of the prompt, the first token of an answer comes from its full reading, whatever is evicted then: recall,
whose answer is one token, says something only if it is asked after the eviction.

Ours: tasks are made of token ids, drawn from `symbols`, so that any model may be asked, and a small one trained for it. The
same seed makes the same items.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from modelwright.cache.engine.evict import evict
from modelwright.cache.engine.method import Method
from modelwright.core.errors import UserError, did_you_mean

TASKS = ("recall", "passkey", "retrieval", "copy")
DIGITS, COPIED = 4, 16


@dataclass
class Items:
    """N contexts with R questions each."""

    context: Tensor  # (N, T)
    questions: Tensor  # (N, R, Q)
    answers: Tensor  # (N, R, A)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Context, question, answer, question, answer, ... as (N, L) ids, and which of them are answers (L,)."""
        pairs = torch.cat([self.questions, self.answers], 2)
        ids = torch.cat([self.context, pairs.flatten(1)], 1)
        answer = torch.arange(pairs.shape[2]) >= self.questions.shape[2]
        return ids, torch.cat([torch.zeros(self.context.shape[1], dtype=torch.bool), answer.repeat(self.answers.shape[1])])


def make(task: str, n: int, length: int, symbols: Tensor, seed: int = 0, questions: int = 1) -> Items:
    """`n` items whose context and question are `length` tokens at most. Raises UserError for an unknown task, or where the length
    or the symbols do not suffice."""
    if task not in TASKS:
        raise UserError(f"unknown task '{task}'", how=did_you_mean(task, TASKS))
    g = torch.Generator().manual_seed(seed % 2**63)
    mark, ask, pool = symbols[0], symbols[1], symbols[2:]
    half = len(pool) // 2

    def draw(size: int, low: int, high: int) -> Tensor:  # (n, size) different symbols in each row
        return low + torch.rand(n, high - low, generator=g).argsort(1)[:, :size]

    def any_of(size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n, size), generator=g)

    def begin(which: Tensor, like: Tensor) -> Tensor:
        return which.expand(*like.shape[:2], 1)

    pairs = {"recall": min((length - 2) // 2, half), "retrieval": (length - 3) // 5}.get(task, 1)
    if half < 2 * DIGITS or length < 2 * DIGITS + 4 or pairs < 1 or task == "copy" and length <= COPIED:
        raise UserError(f"{task} does not fit", f"it has {len(symbols)} symbols and {length} tokens", "give more")
    chosen = torch.rand(n, max(pairs, questions), generator=g).argsort(1)[:, :questions] % pairs  # (n, R)
    rows = torch.arange(n)[:, None]
    if task == "recall":
        keys, values = pool[draw(pairs, 0, half)], pool[any_of(pairs, half, len(pool))]
        context = torch.stack([keys, values], 2).flatten(1)
        asked = keys[rows, chosen][..., None]
        return Items(context, torch.cat([begin(ask, asked), asked], 2), values[rows, chosen][..., None])
    if task == "retrieval":
        side = min(half, 128)
        codes = draw(pairs, 0, side * side)
        keys = pool[torch.stack([codes // side, codes % side], 2)]  # (n, pairs, 2): both tokens are needed to tell keys apart
        values = pool[any_of(2 * pairs, half, len(pool)).view(n, pairs, 2)]
        context = torch.cat([begin(mark, keys), keys, values], 2).flatten(1)
        asked = keys[rows, chosen]
        return Items(context, torch.cat([begin(mark, asked), asked], 2), values[rows, chosen])
    noise = pool[any_of(length - 1, 2 * DIGITS, half)]
    if task == "copy":
        return Items(noise, ask.expand(n, questions, 1), noise[:, None, :COPIED].expand(n, questions, COPIED))
    digits = pool[any_of(DIGITS, 0, 2 * DIGITS)]
    at = torch.randint(0, length - 2 - DIGITS, (n, 1), generator=g) + torch.arange(DIGITS + 1)
    context = noise.scatter(1, at, torch.cat([mark.expand(n, 1), digits], 1))
    return Items(context, mark.expand(n, questions, 1), digits[:, None].expand(n, questions, DIGITS))


@torch.inference_mode()
def solve(model: Any, items: Items, method: Method | None = None, *, after: bool = False, batch: int = 32) -> Tensor:
    """Which answers to the first question come out whole, (N,) bool, by greedy decoding under `method`, or with the full cache.
    With `after`, the context is evicted before the question is seen."""
    A = items.answers.shape[2]
    greedy = GenerationConfig(max_new_tokens=A, min_new_tokens=A, do_sample=False, pad_token_id=0, eos_token_id=None)
    right = []
    with evict(model, method) if method else nullcontext():
        for at in range(0, len(items.context), batch):
            context, question = items.context[at : at + batch], items.questions[at : at + batch, 0]
            ids, past = torch.cat([context, question], 1).to(model.device), {}
            if after:
                past = {"past_key_values": model(ids[:, : context.shape[1]], use_cache=True, logits_to_keep=1).past_key_values}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy, **past)
            right.append((out[:, ids.shape[1] :].cpu() == items.answers[at : at + batch, 0]).all(1))
    return torch.cat(right)
