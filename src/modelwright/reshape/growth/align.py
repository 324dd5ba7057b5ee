"""Turning attention heads towards each other without changing the model (the gauge of 2412.20677).

Values: v_h -> R^T v_h with any rotation R, undone by the columns of the output projection that read the head, W_o[:, h] -> W_o[:, h] R.
Keys: only turns that commute with RoPE: one angle for each frequency pair (i, i + d/2), the same for the key head and its queries. The
score q . k stays. Both are found by generalised Procrustes on activations: each head in turn is turned to the sum of the others. All that
is needed of the activations is their Gram matrix.
"""

import torch
from torch import Tensor

_ROUNDS = 30


def blocks(gram: Tensor, heads: list[int], width: int) -> Tensor:
    """The Gram matrices between heads, (n, n, d, d): [m, k] = X_m^T X_k."""
    n = len(heads)
    index = (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()
    return gram[index][:, index].view(n, width, n, width).transpose(1, 2)


def rotations(cross: Tensor) -> Tensor:
    """R (n, d, d) that bring X_m R_m together, from cross (n, n, d, d)."""
    n, d = cross.shape[0], cross.shape[-1]
    turned = torch.eye(d, dtype=cross.dtype).repeat(n, 1, 1)
    for _ in range(_ROUNDS):
        for m in range(n):
            others = (cross[m] @ turned).sum(0) - cross[m, m] @ turned[m]
            u, _, vh = torch.linalg.svd(others)
            turned[m] = u @ vh
    return turned


def phases(cross: Tensor) -> Tensor:
    """Angles (n, d / 2) by which each pair (i, i + d / 2) of head m is to be turned, from cross (n, n, d, d)."""
    n, half = cross.shape[0], cross.shape[-1] // 2
    a, b = torch.arange(half), torch.arange(half, 2 * half)
    inner = torch.complex(cross[..., a, a] + cross[..., b, b], cross[..., a, b] - cross[..., b, a])  # sum of conj(z_m) z_k
    turn = torch.ones(n, half, dtype=inner.dtype)
    for _ in range(_ROUNDS):
        for m in range(n):
            others = (inner[m] * turn).sum(0) - inner[m, m] * turn[m]
            turn[m] = torch.where(others.abs() > 0, others / others.abs().clamp(min=1e-300), turn[m])
    return turn.angle()


def turn_pairs(rows: Tensor, angle: Tensor) -> Tensor:
    """Rows (d, ...) of one head with each pair turned by its angle (d / 2)."""
    x, y = rows.chunk(2)
    shape = (-1, *[1] * (rows.dim() - 1))
    cos, sin = angle.cos().view(shape).to(rows.dtype), angle.sin().view(shape).to(rows.dtype)
    return torch.cat([x * cos - y * sin, x * sin + y * cos])


def turn_matrix(angle: Tensor) -> Tensor:
    """The same turn as R (d, d) with X R on the right."""
    return turn_pairs(torch.eye(2 * len(angle), dtype=angle.dtype), angle).T


def agreement(cross: Tensor, turned: Tensor | None = None) -> tuple[float, float]:
    """Norm of the mean head over the mean norm of the heads (1: all alike), and the factor that gives the mean that norm."""
    n = cross.shape[0]
    if turned is not None:
        cross = turned.transpose(1, 2)[:, None] @ cross @ turned[None]
    trace = cross.diagonal(dim1=-2, dim2=-1).sum(-1)  # (n, n)
    pooled = (trace.sum() / n**2).clamp(min=0).sqrt()
    members = trace.diagonal().clamp(min=0).sqrt().mean()
    if float(pooled) == 0 or float(members) == 0:
        return 0.0, 1.0
    return float(pooled / members), float(members / pooled)
