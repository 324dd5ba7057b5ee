"""Router initialisation: one row per expert and layer, (E, d).

- normal, zero, uniform: no knowledge. normal N(0, std) is sparse upcycling's; uniform U[0, 1) is the default of the
  official Drop-Upcycling script, kept for `compat`.
- gate_means: the mean gate_proj row of each expert ("A Closer Look into Mixture-of-Experts", 2406.18219, finds that trained
  routers resemble it). Rows are centred over experts and scaled to the norm of a `normal` router [ours].
- prompts, text: the mean input of the feed-forward part over each expert's prompts, minus the mean over its negative prompts
  or over all experts' texts, L2-normalised. This is mergekit-moe's "hidden" mode with two differences: we read the state
  that the router will see (after the norm), and padding is not averaged in.
- ridge: closed form, W = (X^T X + lambda N I)^-1 X^T Y over the same states with one-hot expert labels. A reconstruction of
  what DUME (2603.29765) describes; its scaling of lambda is not known to us.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import check_vocabulary
from modelwright.core.model.hooks import capture


def generator(*key: Any) -> torch.Generator:
    """A generator of its own for each (seed, layer, expert, matrix): the draw does not depend on the order of the work."""
    import hashlib

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1)


def plain_router(kind: str, seed: int, layer: int, experts: int, width: int, std: float) -> Tensor:
    """normal, uniform or zero rows (E, d)."""
    g = generator(seed, "router", layer)
    if kind == "zero":
        return torch.zeros(experts, width)
    if kind == "uniform":
        return torch.rand(experts, width, generator=g)
    return torch.randn(experts, width, generator=g) * std


def from_gates(means: Tensor, std: float) -> Tensor:
    """Rows (E, d) from each expert's mean gate_proj row; identical experts give zero rows."""
    centred = means - means.mean(0)
    norm = centred.norm(dim=1, keepdim=True)
    return centred / norm.clamp_min(1e-12) * (norm > 1e-7 * means.norm()) * std * means.shape[1] ** 0.5


@torch.no_grad()
def states(model: Any, tokenizer: Any, texts: list[str], visit: Callable[[int, Tensor], None], context: int, batch: int = 8) -> None:
    """Run `texts` through the dense model and give `visit(layer, states (N, d))` the feed-forward inputs of real tokens."""
    anatomy = Anatomy(model)
    layers = {b.feed_forward: b.index for b in anatomy.blocks}
    rows = [row for t in texts for row in _rows(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"], context)]
    if not rows:
        raise UserError("an expert's text has no tokens", how="give each expert at least one word")
    model.eval()
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        longest = max(map(len, part))
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in part])
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in part])
        real = mask.bool()

        def each(module: Any, x: Tensor, real: Tensor = real) -> None:
            visit(layers[module], x[real].float())

        with capture(layers, each, side="input"):
            model(input_ids=ids, attention_mask=mask, use_cache=False)


def _rows(ids: list[int], context: int) -> list[list[int]]:
    return [ids[i : i + context] for i in range(0, len(ids), context)]


def from_data(kind: str, model: Any, tokenizer: Any, knobs: Any) -> dict[int, Tensor]:
    """Router rows per layer from prompts or texts: {layer: (E, d)}."""
    if tokenizer is None:
        raise UserError(f"router={kind} needs a tokenizer", "the base has none beside its weights")
    check_vocabulary(tokenizer, int(model.config.vocab_size), "the base")
    if kind == "prompts":
        groups, name = knobs.prompts, "prompts"
    else:
        groups, name = [read(Data(path=p)) for p in knobs.texts], "texts"
    if len(groups) != knobs.experts:
        raise UserError(
            f"{name} has {len(groups)} groups and there are {knobs.experts} experts", "each expert needs its own", f"give {knobs.experts}"
        )
    if not all(isinstance(t, str) for g in groups for t in g):
        raise UserError(
            "texts must hold plain text", "a file of them holds chats or token ids", "give text, or a table with a column 'text'"
        )
    if len({tuple(map(str, g)) for g in groups}) < len(groups):
        raise UserError(
            f"two experts have the same {name}", "their router rows would be equal and one of them never chosen", "give each its own"
        )
    if kind == "prompts" and knobs.negatives and len(knobs.negatives) != knobs.experts:
        raise UserError(
            f"negatives has {len(knobs.negatives)} groups and there are {knobs.experts} experts", how="give one per expert, or none"
        )
    context = min(int(model.config.max_position_embeddings), 512)
    if kind == "ridge":
        return _ridge(model, tokenizer, groups, knobs.ridge, context)
    means = _means(model, tokenizer, groups, context)
    if kind == "prompts" and knobs.negatives:
        negative = _means(model, tokenizer, knobs.negatives, context)
        rows = {layer: m - negative[layer] for layer, m in means.items()}
    else:
        rows = {layer: m - m.mean(0) for layer, m in means.items()}
    return {layer: torch.nn.functional.normalize(r, dim=1) for layer, r in rows.items()}


def _means(model: Any, tokenizer: Any, groups: list[list[str]], context: int) -> dict[int, Tensor]:
    total: dict[int, list[Tensor]] = {}
    for e, texts in enumerate(groups):
        count: dict[int, int] = {}

        def visit(layer: int, x: Tensor, e: int = e, count: dict[int, int] = count) -> None:
            sums = total.setdefault(layer, [])
            if len(sums) == e:
                sums.append(torch.zeros(x.shape[1], dtype=torch.float64))
            sums[e] += x.double().sum(0)
            count[layer] = count.get(layer, 0) + len(x)

        states(model, tokenizer, texts, visit, context)
        for layer, n in count.items():
            total[layer][e] /= n
    return {layer: torch.stack(sums).float() for layer, sums in total.items()}


def _ridge(model: Any, tokenizer: Any, groups: list[list[str]], strength: float, context: int) -> dict[int, Tensor]:
    gram: dict[int, Tensor] = {}
    target: dict[int, Tensor] = {}
    seen: dict[int, int] = {}
    for e, texts in enumerate(groups):

        def visit(layer: int, x: Tensor, e: int = e) -> None:
            x = x.double()
            d = x.shape[1]
            gram.setdefault(layer, torch.zeros(d, d, dtype=torch.float64)).addmm_(x.T, x)
            target.setdefault(layer, torch.zeros(d, len(groups), dtype=torch.float64))[:, e] += x.sum(0)
            seen[layer] = seen.get(layer, 0) + len(x)

        states(model, tokenizer, texts, visit, context)
    rows = {}
    for layer, g in gram.items():
        n, d = seen[layer], len(g)
        scale = float(g.diagonal().mean()) / n  # lambda in units of the mean squared state
        ridge = g / n + strength * scale * torch.eye(d, dtype=torch.float64)
        # where lambda is 0, directions that fp32 states do not show get no weight
        rows[layer] = (torch.linalg.pinv(ridge, rtol=1e-10, hermitian=True) @ target[layer] / n).T.float()
    return rows
