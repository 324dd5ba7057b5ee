"""Responses sampled in batches, the same whoever samples them beside whom.

Each token is drawn by inverting the cumulative distribution at one uniform number, which belongs to the response and to the position. So
the draws hang on the seed alone: not on the size of the batch, not on the number of processes, not on where a run was taken up again.
`generate` of transformers does the rest: caches, padding, stopping.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from modelwright.core.train import dist


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    tokens: int  # of a response, at most
    temperature: float
    top_k: int  # 0: all tokens
    stops: tuple[int, ...]  # tokens that end a response


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one that is drawn."""

    def __init__(self, uniforms: Tensor, begin: int, how: Sampling):
        self.uniforms, self.begin, self.how = uniforms, begin, how

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self.uniforms[:, input_ids.shape[1] - self.begin, None]
        drawn = draw(scores, u, self.how.temperature, self.how.top_k)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def draw(scores: Tensor, uniforms: Tensor, temperature: float, top_k: int) -> Tensor:
    """Tokens (B, 1) drawn from logits (B, V) by uniform numbers (B, 1). Among the `top_k` largest logits, where that is not 0."""
    if not temperature:
        return scores.argmax(1, keepdim=True)
    words = None
    if 0 < top_k < scores.shape[1]:
        scores, words = scores.topk(top_k, dim=1)
    sums = (scores.double() / temperature).softmax(1).cumsum(1)
    total = sums[:, -1:].contiguous()
    at = torch.searchsorted(sums, uniforms.to(sums) * total, right=True)
    at = torch.minimum(at, torch.searchsorted(sums, total))  # never past the last token that has a chance
    return at if words is None else words.gather(1, at)


def uniforms(keys: list[tuple[int, ...]], tokens: int) -> Tensor:
    """One number for each response and position, (B, tokens) float64; `keys` are the seeds of the responses."""
    return torch.from_numpy(np.stack([np.random.default_rng((*k, 1)).random(tokens) for k in keys]))


@torch.no_grad()
def responses(model: Any, prompts: list[Tensor], keys: list[tuple[int, ...]], how: Sampling, size: int) -> list[Tensor]:
    """A response to each prompt, its end token included; `size` of them at a time."""
    found: list[Tensor] = []
    for i in range(0, len(prompts), size):
        part = prompts[i : i + size]
        width = max(len(p) for p in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for row, p in enumerate(part):  # padded on the left
            ids[row, width - len(p) :], seen[row, width - len(p) :] = p, 1
        made = _generated(model, ids.to(model.device), seen.to(model.device), keys[i : i + size], how)
        found += [r[:n] for r, n in zip(made.cpu(), lengths(made, how.stops).tolist(), strict=True)]
    return found


def _generated(model: Any, ids: Tensor, seen: Tensor, keys: list[tuple[int, ...]], how: Sampling) -> Tensor:
    settings = GenerationConfig(
        max_new_tokens=how.tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0, eos_token_id=list(how.stops) or None
    )
    chosen = LogitsProcessorList([_Draw(uniforms(keys, how.tokens).to(ids.device), ids.shape[1], how)])
    together = {"synced_gpus": True} if dist.world() > 1 and any(dist.offset(p) is not None for p in model.parameters()) else {}
    out = model.generate(ids, attention_mask=seen, generation_config=settings, logits_processor=chosen, **together)
    return out[:, ids.shape[1] :]


def lengths(made: Tensor, stops: tuple[int, ...]) -> Tensor:
    """Tokens of each response (B,), its end token included."""
    ended = torch.isin(made, torch.tensor(stops, device=made.device, dtype=made.dtype))
    first = torch.where(ended.any(1), ended.int().argmax(1), made.shape[1] - 1)
    return first + 1
