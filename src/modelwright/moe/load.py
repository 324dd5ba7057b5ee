"""Who is sent where: expert load of any stock mixture-of-experts model."""

import math

import torch
from torch import Tensor

from modelwright.core.anatomy import Anatomy
from modelwright.core.hooks import capture
from modelwright.core.text import Rows, collate


@torch.no_grad()
def expert_load(model: torch.nn.Module, rows: Rows, batch: int = 8) -> Tensor:
    """Share of the routed slots that each expert gets, (layers, E), padding excluded; each layer sums to 1.

    Read from the router's rows and its input, so it works on every class whose router is a linear map with a top-k.
    """
    anatomy = Anatomy(model)
    blocks = [b for b in anatomy.blocks if "router" in b.parts]
    counts = torch.zeros(len(blocks), anatomy.experts)
    weights = dict(model.named_parameters())
    place = {b.feed_forward: (i, b.parts["router"].name) for i, b in enumerate(blocks)}
    training = model.training
    model.eval()
    for start in range(0, len(rows), batch):
        part = collate([rows[i] for i in range(start, min(start + batch, len(rows)))])
        real = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()

        def visit(module: torch.nn.Module, x: Tensor, real: Tensor = real) -> None:
            layer, router = place[module]
            chosen = (x[real.to(x.device)].float() @ weights[router].float().T).topk(anatomy.top_k).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=anatomy.experts).cpu()

        with capture(place, visit, side="input"):
            model(input_ids=part["input_ids"].to(model.device), attention_mask=part.get("attention_mask"), use_cache=False)
    model.train(training)
    return counts / counts.sum(1, keepdim=True)


def divergence(counts: Tensor) -> Tensor:
    """How differently domains are routed, per layer: the Jensen-Shannon divergence in bits over the domains' load.

    counts (domains, layers, E); 0 when every domain uses the experts alike, log2(domains) when none shares an expert.
    """
    load = counts.double() / counts.double().sum(-1, keepdim=True)
    return _bits(load.mean(0)) - _bits(load).mean(0)


def _bits(load: Tensor) -> Tensor:
    return -torch.special.xlogy(load, load).sum(-1) / math.log(2)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio per layer: the busiest expert's load over the mean load, minus 1; 0 is perfect balance."""
    return load.max(1).values * load.shape[1] - 1
