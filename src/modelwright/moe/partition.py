"""Split neurons into experts of given sizes: exact balanced assignment, and k-means with it.

The assignment is a transportation problem: N neurons, E experts, cost (N, E), each expert takes exactly its size. Every
neuron starts at its cheapest expert. Then one neuron after the other leaves an over-full expert: along the cheapest chain
of moves (a -> b -> c, one neuron per move) to an expert with room. This is the method of successive shortest paths on a graph
of E nodes, so the result is optimal; the chain is found with E x E tables, not N x E edges. Ties go to the lower index.

The official MoEfication code solves the same problem by min-cost flow over N x E edges (k_means_constrained), or, in its
faster form, by an auction with a limit on the rounds, which is not optimal.
"""

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import UserError


def even_sizes(neurons: int, experts: int) -> list[int]:
    """The size of each expert; UserError where the neurons do not divide evenly."""
    if neurons % experts:
        near = [e for e in range(2, neurons + 1) if neurons % e == 0]
        close = sorted(sorted(near, key=lambda e: abs(e - experts))[:4])
        raise UserError(
            f"{neurons} neurons do not divide into {experts} experts", "all experts have one size", f"try {', '.join(map(str, close))}"
        )
    return [neurons // experts] * experts


def balanced_assign(cost: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Labels (N,) of least total cost (N, E) in which expert e has exactly sizes[e] neurons."""
    cost = np.ascontiguousarray(cost, np.float64)
    n, e = cost.shape
    if sum(sizes) != n or len(sizes) != e:
        raise ValueError(f"sizes {sizes} do not fit {n} neurons and {e} experts")
    label = cost.argmin(1)
    room = np.array(sizes) - np.bincount(label, minlength=e)
    step, mover = np.full((e, e), np.inf), np.zeros((e, e), np.int64)  # cheapest move a -> b, and the neuron that makes it
    for a in range(e):
        _update(cost, label, a, step, mover)
    while (room < 0).any():
        far = np.where(room < 0, 0.0, np.inf)  # cheapest chain from an over-full expert
        before = np.full(e, -1)
        for _ in range(e):
            through = far[:, None] + step
            best = through.argmin(0)
            value = through[best, np.arange(e)]
            better = value < far - 1e-12
            if not better.any():
                break
            far, before = np.where(better, value, far), np.where(better, best, before)
        at = int(np.where(room > 0, far, np.inf).argmin())
        room[at] -= 1
        touched = {at}
        while before[at] >= 0:
            a = int(before[at])
            label[mover[a, at]] = at
            touched.add(a)
            at = a
        room[at] += 1
        for a in touched:
            _update(cost, label, a, step, mover)
    return label


def _update(cost: np.ndarray, label: np.ndarray, a: int, step: np.ndarray, mover: np.ndarray) -> None:
    members = np.flatnonzero(label == a)
    if len(members):
        extra = cost[members] - cost[members, a][:, None]
        first = extra.argmin(0)
        step[a], mover[a] = extra[first, np.arange(len(step))], members[first]
    else:
        step[a] = np.inf
    step[a, a] = np.inf


def balanced_kmeans(
    rows: Tensor, experts: int, *, rounds: int = 10, seed: int = 0, labels: Tensor | None = None, sizes: list[int] | None = None
) -> tuple[Tensor, Tensor, float]:
    """Labels (N,), centres (E, d) and the sum of squared distances of balanced k-means on L2-normalised rows (N, d).

    Starts from `labels` where they are given, else from k-means++ (seeded). Centres are the means of the labels returned.
    """
    x = torch.nn.functional.normalize(rows.float(), dim=1)
    sizes = sizes or even_sizes(len(x), experts)
    centres = _start(x, experts, seed) if labels is None else group_means(x, labels, experts)
    label = torch.full((len(x),), -1)
    for _ in range(max(rounds, 1)):
        new = torch.from_numpy(balanced_assign(_distances(x, centres), sizes))
        if torch.equal(new, label):
            break
        label, centres = new, group_means(x, new, experts)
    squares = float(_squares(x).sum()) - float((centres.double().pow(2).sum(1) * torch.tensor(sizes)).sum())
    return label, centres, max(squares, 0.0)


def _squares(x: Tensor) -> Tensor:
    """Squared norm of each row (N,), fp64; no copy of the table is made."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()


def _start(x: Tensor, experts: int, seed: int) -> Tensor:
    """k-means++: each next centre is a row drawn with probability proportional to its squared distance to the nearest."""
    g = torch.Generator().manual_seed(seed)
    norms, chosen = _squares(x), [int(torch.randint(len(x), (1,), generator=g))]
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for _ in range(experts - 1):
        last = chosen[-1]
        nearest = torch.minimum(nearest, (norms + norms[last] - 2 * (x @ x[last]).double()).clamp(min=0))
        weight = nearest.clone()
        weight[chosen] = 0
        if float(weight.sum()) <= 0:  # all rows are equal to a centre
            weight = torch.ones(len(x), dtype=torch.float64)
            weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=g)))
    return x[chosen].clone()


def _distances(x: Tensor, centres: Tensor) -> np.ndarray:
    """Squared distances without the rows' own norms, which no assignment depends on: (N, E) fp64."""
    return (centres.double().pow(2).sum(1) - 2 * (x @ centres.T).double()).numpy()


def group_means(x: Tensor, labels: Tensor, groups: int) -> Tensor:
    """Mean row of each group (groups, d); 0 for an empty one. Takes one group at a time."""
    found = torch.zeros(groups, x.shape[1], dtype=x.dtype)
    for e in range(groups):
        own = labels == e
        if bool(own.any()):
            found[e] = x[own].mean(0)
    return found
