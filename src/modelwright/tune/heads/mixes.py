"""Linear mixes of heads (DHA, arXiv 2406.06567): how far the heads of a group are apart, and what one head for all of them is."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def together(labels: Tensor) -> Tensor:
    """Which pairs of heads are in one group, (..., heads, heads)."""
    return labels[..., :, None] == labels[..., None, :]


def fusion_loss(omega: Tensor, labels: Tensor) -> Tensor:
    """L: the mean over groups of two or more of mean_{i<i'} mean_j (omega_ij - omega_i'j)^2; omega (..., m, m), labels (..., m)."""
    same = together(labels).to(omega)
    size = same.sum(-1)  # (..., m): of the head's group
    apart = ((omega[..., :, None, :] - omega[..., None, :, :]).square() * same[..., :, None, :]).sum(-1)  # over j of the group
    pairs = size * (size - 1)  # each counted from both sides
    weight = same / (pairs * size).clamp(min=1)[..., :, None]
    groups = torch.where(size > 1, 1 / size, 0.0).sum()
    return (apart * weight).sum() / groups.clamp(min=1)


def costs_of(omega: Tensor) -> Tensor:
    """cost_ij = mean_k (omega_ik - omega_jk)^2, (..., m, m)."""
    return (omega[..., :, None, :] - omega[..., None, :, :]).square().mean(-1)


def group_rows(omega: Tensor, labels: Tensor) -> Tensor:
    """The mean row of each group (groups, m)."""
    member = one_hot(labels).to(omega).T  # (groups, m)
    return member @ omega / member.sum(1, keepdim=True)


def mixed(p: Tensor, rows: Tensor) -> Tensor:
    """Heads of a weight (m d, in) or bias (m d,) mixed by rows (n, m): n heads."""
    heads = p.unflatten(0, (rows.shape[1], -1)).float()
    return torch.einsum("ij,j...->i...", rows.float(), heads).flatten(0, 1).to(p.dtype)
