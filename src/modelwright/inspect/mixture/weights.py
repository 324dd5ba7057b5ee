"""How alike the weights of a layer's experts are (measures S1 to S5 of arXiv 2406.18219).

S1 matrix:  cos(vec W_i, vec W_j) of the gate, up and down matrices.
S2 neuron:  cos of the mean neuron, mean_f W_i[f] (the columns of down count as its neurons).
S3 reorder: the neurons of j matched one to one to those of i by the largest sum of cosines (Hungarian), then S1 again, and
            Kendall's tau of the matching against the identity. "neuron" matches gate, up and down together [ours]:
            a permuted copy has one permutation for all three.
S4 router:  r2 of the regression of S2 on the cosines of the router's rows, over all pairs of experts.
S5 pca:     the experts in two dimensions: every weight is standardised over the experts, then principal components.
            Computed from the Gram matrix of the experts (E, E), which gives the same coordinates as the official SVD.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.inspect.mixture.layers import KINDS, MixtureLayer, as_rows, chunks


@dataclass
class WeightSimilarity:
    """One layer: the members' names, S1 and S2 by kind (m, m), r2 by kind, and the experts' coordinates (E, 2) by kind."""

    members: list[str]
    matrix: dict[str, Tensor]  # nan where two members have different widths
    neuron: dict[str, Tensor]
    router: Tensor | None  # cosines of the router's rows (E, E)
    router_norms: list[float]
    r2: dict[str, float]  # nan where one side is constant
    pca: dict[str, Tensor]


def cosines(gram: Tensor) -> Tensor:
    """Cosines from inner products (n, n); a zero vector has cosine 0 with all others."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norm, norm)
    cos = torch.where(scale > 0, gram / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)
    return cos.fill_diagonal_(1.0)


def compare(layer: MixtureLayer) -> WeightSimilarity:
    """S1, S2, S4 and S5 of one layer. Reads one kind of matrix at a time."""
    members, e = layer.members, layer.experts
    matrix, neuron, pca = {}, {}, {}
    for kind in KINDS:
        rows = layer.rows(kind)
        matrix[kind] = torch.full((len(rows), len(rows)), math.nan, dtype=torch.float64).fill_diagonal_(1.0)
        for shape in dict.fromkeys(m.shape for m in rows):
            same = [i for i, m in enumerate(rows) if m.shape == shape]
            at = torch.tensor(same)
            matrix[kind][at[:, None], at] = cosines(_gram([rows[i] for i in same]))
        means = torch.stack([m.double().mean(0) for m in rows])
        neuron[kind] = cosines(means @ means.T)
        pca[kind] = _coordinates(rows[:e])
    router = None if layer.router is None else layer.router().double()
    between = None if router is None else cosines(router @ router.T)
    r2 = {k: math.nan if between is None else r_squared(between, neuron[k][:e, :e]) for k in KINDS}
    norms = [] if router is None else [float(n) for n in router.norm(dim=1)]
    return WeightSimilarity(members, matrix, neuron, between, norms, r2, pca)


def _gram(rows: list[Tensor]) -> Tensor:
    """Inner products of flattened matrices of one shape, in fp64, a range of neurons at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in chunks(rows[0].shape[0], len(rows) * rows[0].shape[1]):
        x = as_rows(rows, part)
        total += x @ x.T
    return total


def _coordinates(rows: list[Tensor]) -> Tensor:
    """(E, 2): the first two principal components of the standardised matrices."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in chunks(rows[0].shape[0], len(rows) * rows[0].shape[1]):
        x = as_rows(rows, part)
        x = x - x.mean(0)
        spread = x.std(0, correction=0)
        x = torch.where(spread > 0, x / spread.clamp(min=1e-300), 0.0)
        total += x @ x.T
    values, vectors = torch.linalg.eigh(total)
    found = (vectors * values.clamp(min=0).sqrt()).flip(1)[:, :2]
    return torch.nn.functional.pad(found, (0, 2 - found.shape[1]))


def r_squared(x: Tensor, y: Tensor) -> float:
    """r2 of the linear regression of y on x over the pairs i > j of two (E, E) tables; nan where a side is constant."""
    i, j = torch.tril_indices(len(x), len(x), offset=-1)
    a, b = x[i, j] - x[i, j].mean(), y[i, j] - y[i, j].mean()
    scale = float((a @ a) * (b @ b))
    if len(a) < 3 or float(a.abs().max()) < 1e-9 or float(b.abs().max()) < 1e-9:
        return math.nan
    return float((a @ b) ** 2 / scale)


@dataclass
class Match:
    """Expert `other` with its neurons reordered to fit those of `expert`."""

    expert: int
    other: int
    cosine: float  # of the flattened matrices after reordering
    before: float  # and before
    tau: float  # Kendall's tau of the order against the identity
    order: np.ndarray  # (F,): neuron order[f] of `other` fits neuron f of `expert`


def reorder(a: Tensor, b: Tensor, expert: int = 0, other: int = 1) -> Match:
    """Match the neurons (rows) of two matrices (F, d) one to one by the largest sum of cosines."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("reordering needs scipy", "it is not installed", "pip install scipy, or set reorder=none") from None
    a, b = a.float(), b.float()
    unit_a, unit_b = (torch.nn.functional.normalize(m, dim=1) for m in (a, b))
    order = linear_sum_assignment((unit_a @ unit_b.T).numpy(), maximize=True)[1]
    return Match(expert, other, _cosine(a, b[order]), _cosine(a, b), kendall(order), order)


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    scale = float(x.norm() * y.norm())
    return min(1.0, float(x @ y) / scale) if scale else 0.0


def kendall(order: np.ndarray) -> float:
    """Kendall's tau of a permutation against the identity: 1 the same order, -1 the reverse."""
    n = len(order)
    later = sum(int((order[i + 1 :] > order[i]).sum()) for i in range(n))
    return (4 * later) / (n * (n - 1)) - 1 if n > 1 else 1.0


def reordered(layer: MixtureLayer, pairs: list[tuple[int, int]]) -> dict[str, list[Match]]:
    """S3 for pairs of experts: by kind, and for all three together under "neuron"."""
    read = {k: layer.rows(k) for k in KINDS}
    found: dict[str, list[Match]] = {}
    for i, j in pairs:
        for kind in KINDS:
            found.setdefault(kind, []).append(reorder(read[kind][i], read[kind][j], i, j))
        both = [torch.cat([read[k][e] for k in KINDS], 1) for e in (i, j)]
        found.setdefault("neuron", []).append(reorder(both[0], both[1], i, j))
    return found
