"""Run a text through a dense decoder with one block in memory at a time.

    for block in walk(source, ids):         # in order of depth
        block.ffn_input                     # (tokens, d): what the feed-forward part of this block sees
        block.gate, block.up, block.down    # its matrices, fp32

The hidden states of the text stay in memory; of the weights only the embedding, then one block after the other. Rows
have one length and no padding, so that the causal mask needs no help.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy, Block
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.hooks import capture


@dataclass
class Step:
    """One block on the way: its matrices (F, d), (F, d), (d, F) in fp32, and the input of its feed-forward part, where there is text."""

    block: Block
    gate: Tensor
    up: Tensor
    down: Tensor
    ffn_input: Tensor | None = None  # (tokens, d)


def calibration_ids(source: Checkpoint, data: Data, tokens: int, context: int) -> Tensor:
    """Whole rows of token ids (n, context) from the text, at most `tokens`; UserError where it is shorter than a row."""
    config = source.hf_config.get_text_config()
    context = min(context, int(config.max_position_embeddings), int(getattr(config, "sliding_window", None) or context))
    found = tokenize(read(data), source.tokenizer(), int(config.vocab_size), context)
    whole = found.ids[found.lengths == context] if found.ids.shape[1] == context else found.ids[:0]
    if not len(whole):
        raise UserError(
            f"the calibration text has {found.tokens} tokens", f"one row takes {context}", "give more text, or lower the context"
        )
    return whole[: max(1, tokens // context)].long()


def walk(source: Checkpoint, ids: Tensor | None, batch: int = 8) -> Iterator[Step]:
    """The blocks in order of depth, each with what its feed-forward part sees of the text (None without a text)."""
    anatomy = Anatomy(source.skeleton)
    state, rope = (None, None) if ids is None else (_embed(source, anatomy, ids), _rope(source, ids.shape[1]))
    for b in anatomy.blocks:
        seen = None if state is None else _pass(source, b, state, rope, batch)  # its copy of the block is gone before the next line
        ffn = anatomy.ffn(b)
        assert ffn.gate is not None
        gate, up, down = (v.read(source.get).float() for v in (ffn.gate, ffn.up, ffn.down))
        yield Step(b, gate, up, down, ffn_input=seen)


def _embed(source: Checkpoint, anatomy: Anatomy, ids: Tensor) -> Tensor:
    name = next(p.name for p in anatomy if p.role == "embed")
    table = source.get(name).float()
    return table[ids] * float(getattr(source.hf_config, "embedding_multiplier", 1.0))


def _rope(source: Checkpoint, length: int) -> Any:
    kind = type(source.skeleton.get_submodule("model.rotary_emb"))
    at = torch.arange(length)[None]
    return at, kind(config=source.hf_config)(torch.zeros(1, length, 1), at)


@torch.no_grad()
def _pass(source: Checkpoint, b: Block, state: Tensor, rope: Any, batch: int) -> Tensor:
    """Run one block over all rows, in place; returns its feed-forward inputs (tokens, d)."""
    module = copy.deepcopy(b.module).to_empty(device="cpu").float().eval()
    for name, p in module.named_parameters():
        p.copy_(source.get(f"{b.path}.{name}"))
    module = module.requires_grad_(False)
    feed = module.get_submodule(_below(b))
    seen: list[Tensor] = []
    with capture([feed], lambda m, x: seen.append(x.reshape(-1, x.shape[-1])), side="input"):
        for start in range(0, len(state), batch):
            part = slice(start, start + batch)
            out = module(state[part], attention_mask=None, position_ids=rope[0], position_embeddings=rope[1], use_cache=False)
            state[part] = out[0] if isinstance(out, tuple) else out
    return torch.cat(seen)


def _below(b: Block) -> str:
    """The path of the feed-forward module inside its block."""
    return next(name for name, m in b.module.named_modules() if m is b.feed_forward)
