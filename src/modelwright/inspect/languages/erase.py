"""Taking a property out of vectors: a linear probe for it, its mean (centring), INLP and LEACE."""

from dataclasses import dataclass

import numpy as np

from modelwright.inspect.languages.space import Matrix

_RIDGE = 1e-3


@dataclass(frozen=True)
class Probe:
    """A linear classifier: the largest of x W + b. Ridge regression on one column per class, which has a closed form."""

    weights: Matrix  # (d, classes)
    bias: Matrix

    def accuracy(self, x: Matrix, labels: np.ndarray) -> float:
        return float(((x @ self.weights + self.bias).argmax(1) == labels).mean())


def fit(x: Matrix, labels: np.ndarray, classes: int) -> Probe:
    """The probe of vectors (n, d) and labels 0 .. classes - 1."""
    mean = x.mean(0)
    wanted = np.eye(classes)[labels]
    centred = x - mean
    gram = centred.T @ centred
    strength = _RIDGE * max(np.trace(gram) / len(gram), 1e-12)
    weights = np.linalg.solve(gram + strength * np.eye(len(gram)), centred.T @ (wanted - wanted.mean(0)))
    return Probe(weights, wanted.mean(0) - mean @ weights)


def inlp(x: Matrix, labels: np.ndarray, classes: int, rounds: int = 100) -> tuple[Matrix, list[float]]:
    """The projector of iterated null-space projection, and the probe's accuracy on x before each round.

    Rounds end where the probe is no better than naming the most frequent class, within two standard errors (ours: without them, rounds
    go on until chance hits the very number, and take away what has nothing to do with the classes).
    """
    projector, gone, curve = np.eye(x.shape[1]), 0, list[float]()
    majority = np.bincount(labels, minlength=classes).max() / len(labels)
    chance = majority + 2 * float(np.sqrt(majority * (1 - majority) / len(labels)))
    for _ in range(rounds):
        left = x @ projector
        probe = fit(left, labels, classes)
        curve.append(probe.accuracy(left, labels))
        if curve[-1] <= chance or gone >= x.shape[1] - classes:
            break
        basis = _basis(projector @ probe.weights)  # within what is left, so orthogonal to what is gone
        projector, gone = projector - basis @ basis.T, gone + basis.shape[1]
    return projector, curve


def _basis(columns: Matrix) -> Matrix:
    """An orthonormal basis of the columns' span."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-8 * max(s.max(), 1e-300)]


def leace(x: Matrix, labels: np.ndarray, classes: int) -> tuple[Matrix, Matrix]:
    """(A, mean) of LEACE (2306.03819): x - (x - mean) A has no linear trace of the label, and moves as little as can be."""
    mean, z = x.mean(0), np.eye(classes)[labels]
    centred = x - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    keep = values > 1e-10 * values.max()
    root = vectors[:, keep] * np.sqrt(values[keep]) @ vectors[:, keep].T
    inverse = vectors[:, keep] / np.sqrt(values[keep]) @ vectors[:, keep].T  # the whitening
    basis = _basis(inverse @ (centred.T @ (z - z.mean(0)) / len(x)))
    return inverse @ basis @ basis.T @ root, mean


def centred(x: Matrix, labels: np.ndarray, means: Matrix) -> Matrix:
    """Each vector without the mean of its class."""
    return x - means[labels]


def class_means(x: Matrix, labels: np.ndarray, classes: int) -> Matrix:
    return np.stack([x[labels == c].mean(0) for c in range(classes)])
