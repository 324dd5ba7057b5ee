"""The optimizers of sparse values, and which of them are dropped for which others. Pure functions of vectors."""

import math

import torch
from torch import Tensor


def adam(values: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, decay: float, betas: tuple[float, float], eps: float) -> Tensor:
    """AdamW whose bias correction follows the age of each entry; m, v and age (k,) of `state` change in place."""
    m, v, age = state["m"], state["v"], state["age"]
    age += 1
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    step = m / (1 - betas[0] ** age) / ((v / (1 - betas[1] ** age)).sqrt_() + eps)
    return values * (1 - lr * decay) - lr * step


def sm3(values: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, decay: float, rows: Tensor, columns: Tensor) -> Tensor:
    """SM3-II (1901.11150) without momentum; the accumulators r (o,) and c (i,) of `state` change in place."""
    r, c = state["r"], state["c"]
    nu = torch.minimum(r[rows], c[columns]) + grad * grad
    r.scatter_reduce_(0, rows, nu, "amax")
    c.scatter_reduce_(0, columns, nu, "amax")
    return values * (1 - lr * decay) - lr * grad / (nu + 1e-8).sqrt()


def seeds(total: Tensor, squares: Tensor, count: int, betas: tuple[float, float]) -> dict[str, Tensor]:
    """Moments and age of grown entries from the sum of their gradients and of the squares over `count` steps; without bias."""
    m, v = total / count * (1 - betas[0] ** count), squares / count * (1 - betas[1] ** count)
    return {"m": m, "v": v, "age": torch.full_like(m, count)}


def share(step: int, steps: int, rate: float, decay: str, first: bool) -> float:
    """p: share of the entries that a reselection replaces at most."""
    if decay == "cosine":
        return rate * (1 + math.cos(math.pi * step / steps)) / 2
    return 1.0 if first else rate * (1 - step / steps)


def replaced(values: Tensor, indices: Tensor, n: int, candidates: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(slots, which): the slots whose entries are dropped, and which candidates take them.

    The n smallest values are to go for the n best candidates that are not active beside them. What is both dropped and grown stays; where
    there are fewer candidates than drops, the larger of the dropped stay.
    """
    dropped = values.abs().argsort(stable=True)[:n]
    stays = torch.ones_like(values, dtype=torch.bool)
    stays[dropped] = False
    free = (~torch.isin(candidates, indices[stays])).nonzero()[:, 0]
    best = free[scores[free].argsort(descending=True, stable=True)[:n]]
    both = torch.isin(indices[dropped], candidates[best])
    new = best[~torch.isin(candidates[best], indices[dropped])]
    return dropped[~both][: len(new)], new
