"""Who is sent where: expert load of any stock mixture-of-experts model."""

import math
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import Rows, collate
from modelwright.core.train.trainer import forward
from modelwright.moe.watch import watch


@torch.no_grad()
def expert_load(model: Any, rows: Rows, batch: int = 8) -> Tensor:
    """Share of the routed slots that each expert gets, (layers, E), padding excluded; each layer sums to 1."""
    training = model.training
    model.eval()
    with watch(model) as seen:
        for start in range(0, len(rows), batch):
            part = collate([rows[i] for i in range(start, min(start + batch, len(rows)))])
            forward(model, {k: v.to(model.device) for k, v in part.items()})
    model.train(training)
    return seen.counts / seen.counts.sum(1, keepdim=True)


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
