"""How much each unit of a model matters, by rules that need no training: the baselines of learnt gates.

magnitude   norms of the weights: neurons |W_down| |W_up|, heads |W_o| |W_v|, stream |embedding|, blocks |W_o| + |W_down|
activation  neurons and heads: mean |input of W_down or W_o| times the norm of its columns (as in Wanda and FLAP); stream: mean |state|;
            blocks: block influence, 1 - cos(state before, state after) (ShortGPT, 2403.03853)
random      by lot
uniform     evenly spaced units stay; of blocks the first and the last do
"""

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows, collate
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.hooks import capture
from modelwright.core.train.trainer import forward
from modelwright.tune.pruning.smaller import KINDS, Shape

_TOKENS = 4096  # that activations are measured on


def scores(how: str, model: Any, anatomy: Anatomy, rows: TokenRows, keep: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Scores of all units by kind, shaped as their gates; the `keep[kind]` largest of a row stay."""
    shape = Shape.of(model.config)
    if how == "random":
        rng = torch.Generator().manual_seed(seed)
        return {k: torch.rand(shape.gates(k), generator=rng) for k in KINDS}
    if how == "uniform":
        return {k: _even(shape.gates(k), keep.get(k, shape.gates(k)[-1])) for k in KINDS}
    weights = dict(model.named_parameters())
    found = _magnitude(anatomy, weights, shape)
    return found if how == "magnitude" else _activation(model, anatomy, weights, shape, rows)


def _even(shape: tuple[int, ...], keep: int) -> Tensor:
    n = shape[-1]
    at = torch.linspace(0, n - 1, keep).round().long()
    return torch.zeros(n).index_fill(0, at, 1.0).expand(shape)


def _columns(t: Tensor) -> Tensor:
    return t.detach().float().norm(dim=0).cpu()


def _by_head(values: Tensor, size: int) -> Tensor:
    return values.view(-1, size).square().sum(1).sqrt()


def _magnitude(anatomy: Anatomy, weights: dict[str, nn.Parameter], shape: Shape) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"layers": [], "heads": [], "ffn": []}
    for b in anatomy.blocks:
        o, v, down, up = (weights[b.parts[r].name] for r in ("attn.o", "attn.v", "ffn.down", "ffn.up"))
        found["heads"].append(_by_head(_columns(o), shape.queries * shape.head_dim) * _by_head(_columns(v.T), shape.head_dim))
        found["ffn"].append(_columns(down) * _columns(up.T))
        found["layers"].append(_columns(o).norm() + _columns(down).norm())
    embed = next(p.name for p in anatomy if p.role == "embed")
    return {k: torch.stack(v) for k, v in found.items()} | {"hidden": _columns(weights[embed])}


@torch.no_grad()
def _activation(model: Any, anatomy: Anatomy, weights: dict[str, nn.Parameter], shape: Shape, rows: TokenRows) -> dict[str, Tensor]:
    blocks = anatomy.blocks
    name = {(i, r): b.parts[r].name for i, b in enumerate(blocks) for r in ("attn.o", "ffn.down")}
    inner = {model.get_submodule(n.removesuffix(".weight")): key for key, n in name.items()}
    modules = [model.get_submodule(b.path) for b in blocks]  # the anatomy may be of an empty copy
    sums: dict[Any, Tensor] = {}
    states: dict[int, Tensor] = {}

    def add(key: Any, value: Tensor) -> None:
        sums[key] = sums.get(key, torch.zeros_like(value)) + value

    def after(module: nn.Module, x: Tensor) -> None:
        i = modules.index(module)
        turn = 1 - torch.cosine_similarity(states[i].float(), x.float(), dim=-1)
        add(("influence", i), turn.sum().cpu())
        add("states", states.pop(i).float().abs().sum((0, 1)).cpu())

    def before(module: nn.Module, x: Tensor) -> None:
        states[modules.index(module)] = x

    training = model.training
    model.eval()
    for i in range(max(1, min(len(rows), _TOKENS // max(len(rows[0]["input_ids"]), 1)))):
        batch = {k: v.to(model.device) for k, v in collate([rows[i]]).items()}
        with (
            capture(list(inner), lambda m, x: add(inner[m], x.float().abs().sum((0, 1)).cpu()), side="input"),
            capture(modules, before, side="input"),
            capture(modules, after),
        ):
            forward(model, batch)
    model.train(training)
    n, size = len(blocks), shape.queries * shape.head_dim
    return {
        "layers": torch.stack([sums["influence", i] for i in range(n)]),
        "heads": torch.stack([_by_head(sums[i, "attn.o"] * _columns(weights[name[i, "attn.o"]]), size) for i in range(n)]),
        "ffn": torch.stack([sums[i, "ffn.down"] * _columns(weights[name[i, "ffn.down"]]) for i in range(n)]),
        "hidden": sums["states"],
    }
