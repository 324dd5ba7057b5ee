"""What eviction costs on a text, and what it saves: the loss of a real continuation, greedy agreement, bytes, seconds."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.cache.engine.evict import evict
from modelwright.cache.engine.layer import EvictLayer
from modelwright.cache.engine.method import Method
from modelwright.core.errors import UserError


@dataclass
class Continued:
    """Per row and token of the continuation after its first, which no eviction reaches: (N, C - 1)."""

    nll: Tensor
    choice: Tensor  # the likeliest token
    bytes: int  # of one row's cache once the context is read
    read: float  # seconds per row to read the context
    go_on: float  # and to go on


def fits_context(model: Any, tokens: int, parts: str, how: str) -> None:
    """UserError where the model has fewer positions than `tokens`, which are what `parts` take together."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and tokens > context:
        raise UserError(f"{tokens} tokens do not fit", f"the model's context is {context}, {parts} together", how)


def nbytes(cache: Any) -> int:
    """Bytes that a cache holds."""
    own = [layer.nbytes() for layer in cache.layers if isinstance(layer, EvictLayer)]
    stock = [t for layer in cache.layers if not isinstance(layer, EvictLayer) for t in (layer.keys, layer.values) if t is not None]
    return sum(own) + sum(t.numel() * t.element_size() for t in stock)


@torch.inference_mode()
def continued(model: Any, ids: Tensor, context: int, method: Method | None = None, batch: int = 8) -> Continued:
    """Read `context` tokens of each row of `ids` (N, T), evict, and read the rest as it stands."""
    losses, choices, held, clock = [], [], 0, [0.0, 0.0]
    with evict(model, method) if method else nullcontext():
        for rows in ids.split(batch):
            rows = rows.to(model.device)
            began = time.perf_counter()
            cache = model(rows[:, :context], use_cache=True, logits_to_keep=1).past_key_values
            clock[0] += time.perf_counter() - began
            held = nbytes(cache) // len(rows)
            began = time.perf_counter()
            logits = model(rows[:, context:-1], past_key_values=cache).logits.float()
            clock[1] += time.perf_counter() - began
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, context + 1 :], reduction="none").cpu())
            choices.append(logits.argmax(-1).cpu())
    return Continued(torch.cat(losses), torch.cat(choices), held, clock[0] / len(ids), clock[1] / len(ids))
