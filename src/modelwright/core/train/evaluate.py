"""What a model makes of held-out rows."""

import math
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import PaddedDataset, TokenRows
from modelwright.core.train import dist
from modelwright.core.train.objective import NextToken, Objective
from modelwright.core.train.technique import LossTerm


@torch.no_grad()
def evaluate_rows(model: Any, rows: TokenRows, batch: int, objective: Objective | None = None) -> dict[str, float]:
    """Mean loss of the targets in nats, and bits per byte of the text where its bytes are known (tokens per byte of the whole times bits
    per token). Weights of the rows say what counts, not how much. Several processes share the batches."""
    training, term = model.training, LossTerm()
    objective, own = objective or NextToken(model), objective is None
    if own:
        objective.install(model)
    model.eval()
    full = PaddedDataset(rows, batch * dist.world())
    sums: dict[str, Tensor] = {}

    def add(name: str, total: Any, count: Any) -> None:
        pair = torch.tensor([float(total), float(count)], dtype=torch.float64)
        sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    for i in range(batch * dist.rank(), len(full), batch * dist.world()):
        b = {k: v.to(model.device) for k, v in objective.collate([full[j] for j in range(i, i + batch)]).items()}
        b.pop("weights", None)
        outputs = objective.forward(model, b, term.weights(b))
        add("loss", outputs.total, term.count(b))
        for name, (total, count) in objective.further(b, outputs).items():
            add(name, total, count)
    if own:
        objective.remove()
    dist.reshard(model)
    model.train(training)
    flat = dist.sum_over_ranks(*[v for pair in sums.values() for v in pair])
    means = {n: float(flat[2 * k]) / max(float(flat[2 * k + 1]), 1) for k, n in enumerate(sums)}
    bits = {"bits_per_byte": means["loss"] / math.log(2) * rows.tokens / rows.bytes} if rows.bytes and objective.kind == "causal" else {}
    return means | {"tokens": int(flat[1])} | bits
