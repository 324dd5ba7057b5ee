"""Words, n-grams and signatures of a batch: the same as one by one, and as a plain loop."""

import random
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from modelwright.curate.kernels.minhash import band_keys, choose, meets, sign
from modelwright.curate.kernels.words import kinds, ngrams, words

LETTERS = "aZ09_ .,\n\t\0éÉßİıΣσςЖж漢字かなกขaक्षिहिन्दीÅK𝒜😀𠀀\u00ad\u200bﬁ１Ａ\ud800"


def plain(text: str) -> list[str]:
    """The words by a loop over characters."""
    kind, lower = kinds()
    out, now = [], ""
    for c in text.encode("utf-8", "replace").decode() + " ":
        code = min(ord(c), len(kind) - 1)
        what = int(c.isalnum() or c == "_") if c < "\x80" else int(kind[code])
        c = c.lower() if c < "\x80" else chr(lower[code]) if what else c
        if what == 1:
            now += c
            continue
        out += [w for w in (now, c if what == 2 else "") if w]
        now = ""
    return out


def texts(n: int, seed: int, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(0, longest))) for _ in range(n)]


def test_words_equal_a_loop_over_characters() -> None:
    for seed in range(150):
        batch = texts(5, seed)
        w, found = words(batch), [[] for _ in batch]
        for a, b, doc in zip(w.start, w.end, w.doc, strict=True):
            found[doc].append(w.data[a:b].tobytes().decode())
        assert found == [plain(t) for t in batch]


def test_ascii_words_are_those_of_a_regular_expression() -> None:
    import re

    text = "".join(map(chr, range(128))) + " The_cat, the CAT2 don't"
    w = words([text])
    assert [w.data[a:b].tobytes().decode() for a, b in zip(w.start, w.end, strict=True)] == re.findall(r"\w+", text.lower())


def test_equal_words_have_equal_hashes_and_different_ones_different() -> None:
    rng = random.Random(0)
    vocabulary = {"".join(rng.choices("abcdefgh", k=rng.randint(1, 40))) for _ in range(20_000)} | {"x" * k for k in range(1, 600)}
    listed = sorted(vocabulary)
    w = words([" ".join(listed), " ".join(reversed(listed))])
    one, two = w.hash[w.doc == 0], w.hash[w.doc == 1]
    assert len(set(one.tolist())) == len(listed) and (one == two[::-1]).all()


def test_a_batch_equals_its_documents_one_by_one() -> None:
    batch = texts(60, 7, 200)
    shingles, doc = ngrams(words(batch), 3)
    whole = sign(shingles, doc, len(batch), 16)
    for i, text in enumerate(batch):
        s, d = ngrams(words([text]), 3)
        assert (s == shingles[doc == i]).all() and (sign(s, d, 1, 16)[0] == whole[i]).all()


def test_ngrams_are_as_many_as_places_and_know_the_order_of_words() -> None:
    s, doc = ngrams(words(["a b c d", "d c b a", "a b", ""]), 3)
    assert doc.tolist() == [0, 0, 1, 1] and len(set(s.tolist())) == 4
    assert len(ngrams(words(["a b"]), 3)[0]) == 0


def test_the_order_and_the_number_of_equal_shingles_leave_the_signature() -> None:
    rng = np.random.default_rng(0)
    s = rng.integers(0, 2**64, 300, dtype=np.uint64)
    doc = np.zeros(600, np.int32)
    twice = rng.permutation(np.concatenate([s, s]))
    assert (sign(s, doc[:300], 1) == sign(twice, doc, 1)).all()


def pair(rng: np.random.Generator, size: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` shingles with a known overlap."""
    both = round(size * share)
    s = rng.integers(0, 2**64, 2 * size - both, dtype=np.uint64)
    return s[:size], s[size - both :]


def many(n: int, size: int, share: float, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    sets = [x for _ in range(n) for x in pair(rng, size, share)]
    found = sign(np.concatenate(sets), np.repeat(np.arange(2 * n, dtype=np.int32), size), 2 * n, k, seed)
    both = round(size * share)
    return found[::2], found[1::2], both / (2 * size - both)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_the_estimate_is_unbiased_and_as_spread_as_theory_says(share: float) -> None:
    k = 128
    a, b, j = many(1000, 150, share, k, 1)
    error = (a == b).mean(1) - j
    sd = np.sqrt(j * (1 - j) / k)
    assert abs(error.mean()) < 3 * sd / np.sqrt(1000) and np.abs(error).mean() < sd and 0.9 < error.std() / sd < 1.1


def test_the_share_of_pairs_that_meet_follows_the_s_curve() -> None:
    b, r = 14, 8
    for share in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95):
        x, y, j = many(1200, 120, share, b * r, 2)
        met = (band_keys(x, b, r) == band_keys(y, b, r)).any(1).mean()
        assert abs(met - meets(j, b, r)) < 0.03 + 1e-9, share


def test_bands_do_not_share_keys() -> None:
    equal = np.full((1, 32), 7, np.uint32)
    assert len(set(band_keys(equal, 8, 4)[0].tolist())) == 8


def test_the_chosen_bands_have_the_smallest_wrong_area() -> None:
    """The integrals in closed form, by the binomial theorem, over all pairs."""

    def area(t: Fraction, b: int, r: int) -> Fraction:
        return t - sum(Fraction((-1) ** k * comb(b, k)) * t ** (r * k + 1) / (r * k + 1) for k in range(b + 1))

    for t in (Fraction(1, 2), Fraction(7, 10), Fraction(9, 10)):
        wrong = {
            (b, r): area(t, b, r) + (1 - t) - (area(Fraction(1), b, r) - area(t, b, r)) for r in range(1, 25) for b in range(1, 24 // r + 1)
        }
        assert wrong[choose(float(t), 24)] == min(wrong.values())
    assert choose(0.7, 128) == (14, 9) and choose(0.5, 128) == (25, 5)
