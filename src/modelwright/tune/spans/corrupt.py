"""Span corruption with T5's exact counts (arXiv 1910.10683): spans are hidden behind sentinels, and a decoder learns them.

    n_noise = clip(round(0.15 L), 1, L - 1)    n_spans = max(1, round(n_noise / 3))

Noise and the rest are each cut into n_spans random parts of one token or more; the rest comes first, so that no two spans touch.

    encoder   rest_0 <extra_id_0> rest_1 <extra_id_1> ...
    decoder   <extra_id_0> span_0 <extra_id_1> span_1 ... <extra_id_n>
"""

from typing import Any

import numpy as np

from modelwright.core.errors import UserError


def counts(length: int, density: float = 0.15, mean: float = 3.0, most: int = 100) -> tuple[int, int]:
    """Hidden tokens and spans of a sequence of `length` tokens; at most `most` spans. (0, 0) where nothing can be hidden."""
    if length < 2:
        return 0, 0
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(1, round(noise / mean)), length - noise, most)


def raw_length(context: int, density: float = 0.15, mean: float = 3.0, most: int = 100) -> tuple[int, int]:
    """The longest sequence whose encoder input, its end token counted, has at most `context` tokens; and the length of its target."""

    def given(length: int) -> int:
        noise, spans = counts(length, density, mean, most)
        return length - noise + spans + 1

    length = 2
    if given(length) > context:
        raise UserError(f"a context of {context} holds no corrupted text", "three tokens are the least", "raise train.context")
    while given(length + 1) <= context:
        length += 1
    noise, spans = counts(length, density, mean, most)
    return length, noise + spans + 2


def noise_mask(length: int, rng: np.random.Generator, density: float = 0.15, mean: float = 3.0, most: int = 100) -> np.ndarray:
    """Which tokens (length,) are hidden."""
    noise, spans = counts(length, density, mean, most)
    if not spans:
        return np.zeros(length, bool)
    parts = np.stack([_parts(length - noise, spans, rng), _parts(noise, spans, rng)], 1).flatten()
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def _parts(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A random partition of `items` into `parts` of one or more, each as likely."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.zeros(0, int)
    return np.diff(np.concatenate([[0], cuts, [items]]))


def corrupt(
    ids: list[int], sentinels: list[int], rng: np.random.Generator, density: float = 0.15, mean: float = 3.0
) -> tuple[list[int], list[int]]:
    """Encoder input and decoder target, without end tokens."""
    mask = noise_mask(len(ids), rng, density, mean, len(sentinels) - 1)
    given: list[int] = []
    target: list[int] = []
    spans = 0
    for i, (token, hidden) in enumerate(zip(ids, mask.tolist(), strict=True)):
        if not hidden:
            given.append(token)
            continue
        if not mask[i - 1]:
            given.append(sentinels[spans])
            target.append(sentinels[spans])
            spans += 1
        target.append(token)
    return given, [*target, sentinels[spans]] if spans else []


def reconstruct(given: list[int], target: list[int], sentinels: list[int]) -> list[int]:
    """Undo of `corrupt`."""
    known, at = set(sentinels), None
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in known:
            at = token
            spans[at] = []
        elif at is not None:
            spans[at].append(token)
    return [t for token in given for t in (spans[token] if token in known else [token])]


def sentinels_of(tokenizer: Any) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1> ... in this order, whatever their numbers. UserError where there are fewer than two."""
    found: list[int] = []
    while len(found) < 100:
        token = tokenizer.convert_tokens_to_ids(f"<extra_id_{len(found)}>")
        if token is None or token == tokenizer.unk_token_id:
            break
        found.append(int(token))
    if len(found) < 2:
        raise UserError("the tokenizer has no sentinels", "<extra_id_0> and the rest mark the hidden spans", "use a T5 or mT5, or add them")
    return found
