"""Which neurons make an expert: four ways to split a feed-forward part into equal groups.

- random: a seeded permutation. (The official baseline cuts contiguous blocks, which is not random; see `contiguous`.)
- kmeans: balanced k-means on the L2-normalised rows of the gate, the up matrix or both side by side (MoEfication's
  parameter clustering; LLaMA-MoE's choices of rows).
- coactivation: neurons that fire on the same tokens. Balanced k-means on the rows of the co-firing matrix [ours]; the paper
  partitions the graph by METIS and then moves a random surplus.
- cmoe: each token marks its `k_act` strongest neurons (CMoE, 2502.04416). Neurons marked most often become the shared
  expert; the rest is clustered by the L1 distance of their marks, starting from the most often marked.
"""

import torch
from torch import Tensor

from modelwright.moe.partition import balanced_assign, balanced_kmeans, group_means
from modelwright.reshape.experts.routers import generator


def contiguous(neurons: int, experts: int) -> Tensor:
    """Labels (F,) in blocks, as the official "random" baseline has them."""
    return torch.arange(neurons) // (neurons // experts)


def split_random(neurons: int, experts: int, seed: int, layer: int) -> Tensor:
    order = torch.randperm(neurons, generator=generator(seed, "split", layer))
    labels = torch.empty(neurons, dtype=torch.long)
    labels[order] = contiguous(neurons, experts)
    return labels


def split_kmeans(gate: Tensor, up: Tensor, experts: int, features: str, seed: int, rounds: int = 10) -> Tensor:
    """Labels from the weights: gate, up (F, d)."""
    rows = {"gate": gate, "up": up}.get(features)
    if rows is None:
        rows = torch.cat([torch.nn.functional.normalize(m.float(), dim=1) for m in (gate, up)], 1)
    return balanced_kmeans(rows, experts, seed=seed, rounds=rounds)[0]


def fires(strength: Tensor, share: float = 0.2) -> Tensor:
    """Which neurons fire on a token, from their strengths (n, F) >= 0: those that are not 0, but at most `share` of all."""
    top = strength.topk(max(1, int(strength.shape[1] * share)), 1)
    return torch.zeros_like(strength).scatter_(1, top.indices, (top.values > 0).to(strength.dtype))


def split_coactivation(strength: Tensor, experts: int, seed: int, rounds: int = 10) -> Tensor:
    """Labels from strengths (n, F) of the neurons on a text."""
    fired = fires(strength)
    return balanced_kmeans(fired.T @ fired / len(fired), experts, seed=seed, rounds=rounds)[0]


def split_cmoe(strength: Tensor, experts: int, shared: int, size: int, k_act: int = 10, rounds: int = 4) -> Tensor:
    """Labels (F,) of routed experts 0 .. E - 1, and -1 for the shared * size neurons that are always on."""
    marks = torch.zeros_like(strength)
    marks.scatter_(1, strength.topk(min(k_act, strength.shape[1]), 1).indices, 1.0)
    order = marks.sum(0).argsort(descending=True, stable=True)
    labels = torch.full((strength.shape[1],), -1)
    rest = order[shared * size :]  # most often marked first
    m = marks.T[rest]  # (F', n): for marks of 0 and 1 the L1 distance to c is |m| + |c| - 2 m c
    centres, label = m[:experts].clone(), torch.full((len(rest),), -1)
    for _ in range(rounds):
        new = torch.from_numpy(balanced_assign((centres.sum(1) - 2 * m @ centres.T).double().numpy(), [size] * experts))
        if torch.equal(new, label):
            break
        label, centres = new, group_means(m, new, experts)
    labels[rest] = label
    return labels


def split_shared(strength: Tensor | None, gate: Tensor, shared: int, size: int) -> Tensor:
    """The neurons (shared * size,) that are always on: those that fire most often, or with no text those of the largest rows."""
    rate = fires(strength).mean(0) if strength is not None else gate.float().norm(dim=1)
    return rate.argsort(descending=True, stable=True)[: shared * size]
