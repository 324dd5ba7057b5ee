"""Vectors of examples: their words, a checkpoint's last states, or the gradients of its losses."""

import re
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from modelwright.core.errors import UserError


def words(texts: list[str], width: int = 256) -> Tensor:
    """Counts of words hashed to `width` places with a sign, of length one; (n, width)."""
    found = torch.zeros(len(texts), width)
    for i, text in enumerate(texts):
        for w in re.findall(r"\w+", text.lower()):
            h = zlib.crc32(w.encode())
            found[i, h % width] += 1.0 if h & (1 << 20) else -1.0
    return F.normalize(found, dim=1)


@torch.no_grad()
def states(source: Any, texts: list[str], context: int = 256) -> Tensor:
    """The last state of the last token of each text, centred and of length one; (n, d)."""
    model, tokenizer = source.model(torch.float32).eval(), source.tokenizer()
    found = []
    for text in texts:
        ids = torch.tensor([_ids(tokenizer, text, context)])
        found.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return F.normalize(torch.stack(found) - torch.stack(found).mean(0), dim=1)


def _ids(tokenizer: Any, text: str, context: int) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])[:context]
    if len(ids) < 2:
        raise UserError(f"'{text[:40]}' has fewer than two tokens", "it has no next token", "leave it out")
    return ids


def gradients(model: Any, rows: list[Tensor], batch: int = 8) -> Tensor:
    """The gradient of each row's mean next-token loss over all weights, exact; (n, weights) in fp32. `rows` are token ids."""
    model.eval()
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], ids: Tensor, real: Tensor) -> Tensor:
        logits = functional_call(model, p, (), {"input_ids": ids[None], "use_cache": False}).logits[0, :-1].float()
        each = F.cross_entropy(logits, ids[1:], reduction="none")
        return (each * real[1:]).sum() / real[1:].sum()

    found = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        longest = max(map(len, part))
        ids = torch.stack([F.pad(r, (0, longest - len(r))) for r in part])
        real = torch.stack([torch.arange(longest) < len(r) for r in part]).float()
        each = vmap(grad(loss), in_dims=(None, 0, 0))(params, ids, real)
        found.append(torch.cat([g.flatten(1) for g in each.values()], 1))
    return torch.cat(found)


def kernel(source: Any, texts: list[str], tests: list[str], context: int = 128) -> Tensor:
    """<g_i, g'_m> of all weights at the checkpoint, (N, M); tests are taken a few at a time, so memory holds their gradients only."""
    model, tokenizer = source.model(torch.float32), source.tokenizer()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # the fused kernels have no rule for vmap
    ids = [torch.tensor(_ids(tokenizer, t, context)) for t in (*texts, *tests)]
    of_tests = gradients(model, ids[len(texts) :])
    return torch.cat([gradients(model, ids[at : at + 8]) @ of_tests.T for at in range(0, len(texts), 8)])[: len(texts)]
