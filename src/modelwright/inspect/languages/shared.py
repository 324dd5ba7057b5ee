"""Languages in one space, layer by layer, and what centring, INLP and LEACE change in one layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modelwright.inspect.languages import erase, space
from modelwright.inspect.languages.space import Matrix
from modelwright.inspect.languages.vectors import Reader

Vectors = dict[str, np.ndarray]  # language -> (layers + 1, n, d), row i of each is the same sentence


@dataclass(frozen=True)
class Halves:
    """Which sentences a probe is fitted on and which it is tried on; both languages of a pair are in the same half."""

    fitted: np.ndarray
    tried: np.ndarray

    @classmethod
    def of(cls, n: int, seed: int) -> "Halves":
        order = np.random.default_rng(seed).permutation(n)
        return cls(np.sort(order[: n // 2]), np.sort(order[n // 2 :]))


def stacked(vectors: dict[str, Matrix], rows: np.ndarray) -> tuple[Matrix, np.ndarray]:
    """The chosen sentences of every language under each other, and the number of the language of each."""
    x = np.concatenate([v[rows] for v in vectors.values()])
    return x, np.repeat(np.arange(len(vectors)), len(rows))


def retrieval(vectors: dict[str, Matrix], pivot: str, rows: np.ndarray) -> dict[str, float]:
    """P@1 of each language against the pivot on the chosen sentences."""
    x = vectors[pivot][rows]
    return {k: space.precision_at_1(space.likeness(v[rows], x)) for k, v in vectors.items() if k != pivot}


def layer_of(vectors: Vectors, layer: int) -> dict[str, Matrix]:
    return {k: v[layer] for k, v in vectors.items()}


def by_layer(vectors: Vectors, pivot: str, halves: Halves) -> list[dict[str, Any]]:
    """All measures of each layer; retrieval over all sentences, what is fitted over the half that was not fitted on."""
    found = []
    everything = np.arange(vectors[pivot].shape[1])
    for layer in range(len(vectors[pivot])):
        at = layer_of(vectors, layer)
        x, others = at[pivot], {k: v for k, v in at.items() if k != pivot}
        cosines = {k: space.likeness(v, x) for k, v in others.items()}
        probe = erase.fit(*stacked(at, halves.fitted), len(at))
        means = {k: v[halves.fitted].mean(0) for k, v in at.items()}
        neutral = {k: v - means[k] for k, v in at.items()}
        found.append(
            {
                "precision_at_1": retrieval(at, pivot, everything),
                "precision_at_1_csls": {k: space.precision_at_1(space.csls(c)) for k, c in cosines.items()},
                "precision_at_1_half": retrieval(at, pivot, halves.tried),
                "precision_at_1_centred_half": retrieval(neutral, pivot, halves.tried),
                "cka": {k: space.cka(v, x) for k, v in others.items()},
                "procrustes": {k: space.procrustes(v, x) for k, v in others.items()},
                "gromov_hausdorff": {k: space.gromov_hausdorff(v, x) for k, v in others.items()},
                "spectral": {k: space.spectral_distance(v, x) for k, v in others.items()},
                "anisotropy": {k: space.anisotropy(v) for k, v in at.items()},
                "language_probe": probe.accuracy(*stacked(at, halves.tried)),
            }
        )
    return found


def debiased(vectors: Vectors, pivot: str, layer: int, halves: Halves, reader: Reader, sentences: list[str]) -> dict[str, dict[str, Any]]:
    """The language probe and P@1 on the tried half: as it is, centred, after INLP, after LEACE; and what INLP and LEACE cost in loss.

    The loss is the pivot's, with the change made to what the block before this layer gives out.
    """
    at, names = layer_of(vectors, layer), list(vectors)
    x, labels = stacked(at, halves.fitted)
    means = erase.class_means(x, labels, len(names))
    projector, curve = erase.inlp(x, labels, len(names))
    move, mean = erase.leace(x, labels, len(names))
    changed = {
        "as it is": at,
        "centred": {k: v - means[i] for i, (k, v) in enumerate(at.items())},
        "INLP": {k: v @ projector for k, v in at.items()},
        "LEACE": {k: v - (v - mean) @ move for k, v in at.items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for name, of in changed.items():
        probe = erase.fit(*stacked(of, halves.fitted), len(names))
        found[name] = {
            "language_probe": probe.accuracy(*stacked(of, halves.tried)),
            "precision_at_1": float(np.mean(list(retrieval(of, pivot, halves.tried).values()))),
        }
    found["INLP"]["rounds"] = len(curve) - 1
    if reader.kind == "causal":
        found["as it is"]["loss"] = reader.loss(sentences)
        if layer > 0:
            found |= _costs(found, reader, layer, (projector, move, mean), sentences)
    return found


def _costs(found: dict[str, Any], reader: Reader, layer: int, changes: tuple[Matrix, Matrix, Matrix], texts: list[str]) -> dict[str, Any]:
    """The loss with INLP and with LEACE in place."""
    import torch

    device = reader.model.device
    projector, move, mean = (torch.tensor(c, dtype=torch.float32, device=device) for c in changes)
    with reader.changed(layer - 1, lambda h: (h.float() @ projector).to(h.dtype)):
        inlp = found["INLP"] | {"loss": reader.loss(texts)}
    with reader.changed(layer - 1, lambda h: (h.float() - (h.float() - mean) @ move).to(h.dtype)):
        leace = found["LEACE"] | {"loss": reader.loss(texts)}
    return {"INLP": inlp, "LEACE": leace}
