"""How far two languages share a space: retrieval, kernel alignment, Procrustes, shape. X, Y: (n, d), row i of both is one sentence."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def unit(x: Matrix) -> Matrix:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def likeness(x: Matrix, y: Matrix) -> Matrix:
    """Cosines, (n, m)."""
    return unit(x) @ unit(y).T


def csls(cosines: Matrix, k: int = 10) -> Matrix:
    """2 cos(x, y) - r(x) - r(y); r is the mean cosine to the k nearest on the other side: hubs lose."""
    k = min(k, *cosines.shape)
    there = np.sort(cosines, 1)[:, -k:].mean(1, keepdims=True)
    back = np.sort(cosines, 0)[-k:].mean(0, keepdims=True)
    return 2 * cosines - there - back


def margin(cosines: Matrix, k: int = 10) -> Matrix:
    """The cosine over the mean of both sides' neighbours, the score used for mining pairs."""
    k = min(k, *cosines.shape)
    there = np.sort(cosines, 1)[:, -k:].mean(1, keepdims=True)
    back = np.sort(cosines, 0)[-k:].mean(0, keepdims=True)
    return cosines / ((there + back) / 2)


def precision_at_1(scores: Matrix) -> float:
    """Share of sentences whose nearest on the other side is their own translation, mean of both directions."""
    own = np.arange(len(scores))
    return float(((scores.argmax(1) == own).mean() + (scores.argmax(0) == own).mean()) / 2)


def cka(x: Matrix, y: Matrix) -> float:
    """Linear CKA: ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred X and Y; 1 for a rotated, moved or scaled copy."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def procrustes(x: Matrix, y: Matrix) -> float:
    """min ||X W - Y|| / ||Y|| over rotations W, both centred and of norm one; 0 for a rotated copy."""
    x, y = (v - v.mean(0) for v in (x, y))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    u, _, v = np.linalg.svd(x.T @ y)
    return float(np.linalg.norm(x @ u @ v - y))


def gromov_hausdorff(x: Matrix, y: Matrix) -> float:
    """A lower bound of the Gromov-Hausdorff distance: half the bottleneck distance of the lengths at which clusters merge."""
    a, b = _merges(x), _merges(y)
    best = max(a[0], b[0]) / 2
    for k in range(1, len(a) + 1):  # the k longest lengths are matched, the others vanish
        rest = max(a[k], b[k]) / 2 if k < len(a) else 0.0
        best = min(best, max(float(np.abs(a[:k] - b[:k]).max()), rest))
    return float(best / 2)


def _merges(x: Matrix) -> Matrix:
    """Edges of the minimum spanning tree over the points of norm one, the longest first (Prim)."""
    far = np.sqrt(np.maximum(2 - 2 * likeness(x, x), 0))
    near, inside, edges = far[0].copy(), np.zeros(len(x), bool), []
    inside[0] = True
    for _ in range(len(x) - 1):
        i = int(np.where(inside, np.inf, near).argmin())
        edges.append(near[i])
        inside[i] = True
        near = np.minimum(near, far[i])
    return np.sort(edges)[::-1]


def spectral_distance(x: Matrix, y: Matrix, neighbours: int = 10) -> float:
    """Sum of squared differences of the largest Laplacian eigenvalues of both neighbour graphs, as many as hold 90 % of either."""
    a, b = _spectrum(x, neighbours), _spectrum(y, neighbours)
    k = min(int(np.searchsorted(np.cumsum(v) / v.sum(), 0.9)) + 1 for v in (a, b))
    return float(((a[:k] - b[:k]) ** 2).sum())


def _spectrum(x: Matrix, neighbours: int) -> Matrix:
    cosines = likeness(x, x)
    np.fill_diagonal(cosines, -2)
    near = np.argsort(-cosines, 1, kind="stable")[:, : min(neighbours, len(x) - 1)]
    graph = np.zeros_like(cosines)
    np.put_along_axis(graph, near, 1, 1)
    graph = np.maximum(graph, graph.T)
    return np.linalg.eigvalsh(np.diag(graph.sum(1)) - graph)[::-1].astype(np.float64)


def anisotropy(x: Matrix) -> float:
    """Mean cosine of two different sentences: where it is near 1, cosines say little."""
    cosines = likeness(x, x)
    n = len(x)
    return float((cosines.sum() - n) / (n * (n - 1)))
