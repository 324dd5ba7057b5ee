"""The nearest questions by meaning: sentence vectors of any checkpoint, or of words, and exact search."""

import hashlib
from collections import Counter

import numpy as np

from modelwright.curate.generators.overlap import words

_BUCKETS = 4096


def nearest(queries: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    """(q, k) places of the k nearest rows of `known` by L2 distance of unit vectors, nearest first; the earlier of equals first."""
    likeness = queries @ known.T  # (q, n): for unit vectors the largest cosine is the smallest distance
    return np.argsort(-likeness, axis=1, kind="stable")[:, :k]


def vectors(texts: list[str], encoder: str) -> np.ndarray:
    """(n, d) unit vectors: `words`, or the mean of a checkpoint's last hidden states over at most 512 tokens."""
    found = _of_words(texts) if encoder == "words" else _of_model(texts, encoder)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _of_words(texts: list[str]) -> np.ndarray:
    """Word counts, each weighed by how rare the word is, in a fixed number of buckets."""
    counts = [Counter(words(t)) for t in texts]
    rare = Counter(w for c in counts for w in c)
    found = np.zeros((len(texts), _BUCKETS), np.float32)
    for i, c in enumerate(counts):
        for word, n in c.items():
            found[i, _bucket(word)] += n * np.log(1 + len(texts) / rare[word])
    return found


def _bucket(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest()) % _BUCKETS


def _of_model(texts: list[str], encoder: str) -> np.ndarray:
    import torch

    from modelwright.core.errors import UserError
    from modelwright.core.model.checkpoint import Checkpoint

    source = Checkpoint(encoder)
    tokenizer, model = source.tokenizer(), source.model().eval()
    if tokenizer is None:
        raise UserError(f"{encoder} has no tokenizer", "questions are turned into vectors with it", "name another encoder, or words")
    most = min(512, getattr(model.config, "max_position_embeddings", None) or 512)
    found = []
    with torch.inference_mode():
        for text in texts:
            batch = tokenizer(text, return_tensors="pt", max_length=most, truncation=True)
            states = model(**batch, output_hidden_states=True).hidden_states[-1]  # (1, T, d)
            found.append(states.float().mean(1)[0].numpy())
    return np.stack(found)
