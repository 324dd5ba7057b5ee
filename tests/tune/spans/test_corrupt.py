"""Span corruption that can be undone, with T5's counts; shares of languages by their definitions."""

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.tune.spans.corrupt import corrupt, counts, noise_mask, raw_length, reconstruct, sentinels_of
from modelwright.tune.spans.mixing import exponent, shares, unimax

SENTINELS = list(range(999, 899, -1))  # they count down, as mT5's do


def test_ten_thousand_sequences_are_whole_again() -> None:
    rng, known = np.random.default_rng(0), set(SENTINELS)
    for n in [*range(21), *rng.integers(21, 200, 9_980).tolist()]:
        ids = rng.integers(3, 800, n).tolist()
        given, target = corrupt(ids, SENTINELS, rng)
        if n < 2:
            assert (given, target) == (ids, [])
            continue
        assert reconstruct(given, target, SENTINELS) == ids
        noise, spans = counts(n)
        assert len(given) == n - noise + spans and len(target) == noise + spans + 1
        assert [t for t in given if t in known] == SENTINELS[:spans]
        assert [t for t in target if t in known] == SENTINELS[: spans + 1]
        assert given[0] not in known, "the first token is never hidden"
        assert not any(a in known and b in known for a, b in zip(given, given[1:], strict=False)), "no two spans touch"


def test_counts_are_t5_s() -> None:
    assert [counts(n) for n in (0, 1, 2, 3, 10, 20, 100, 512)] == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 1), (3, 1), (15, 5), (77, 26)]
    assert all(abs(counts(n)[0] / n - 0.15) <= 1 / n for n in range(4, 2000))
    assert counts(10_000)[1] == 100 and counts(10_000, most=19)[1] == 19, "never more spans than sentinels"
    assert counts(10, density=0.9, mean=1.0) == (9, 1), "one token or more stays between two spans"


@pytest.mark.parametrize("context", [3, 24, 512, 1024])
def test_raw_length_fills_the_context(context: int) -> None:
    length, target = raw_length(context)
    given, said = corrupt(list(range(1000, 1000 + length)), SENTINELS, np.random.default_rng(0))
    assert len(given) + 1 == context or context == 3
    assert len(said) + 1 == target
    noise, spans = counts(length + 1)
    assert length + 1 - noise + spans + 1 > context


def test_every_partition_is_as_likely() -> None:
    rng, seen = np.random.default_rng(0), {}
    for _ in range(3000):
        key = noise_mask(8, rng, 0.5, 2.0).tobytes()
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 9 and max(seen.values()) < 1.4 * min(seen.values())  # 3 ways to cut 4 into 2, twice


def test_tokenizer_without_sentinels_is_refused() -> None:
    class Bare:
        unk_token_id = 2

        def convert_tokens_to_ids(self, token: str) -> int:
            return 2

    with pytest.raises(UserError, match="no sentinels"):
        sentinels_of(Bare())


SIZES = {"en": 1000, "de": 100, "sw": 10}


def test_shares_by_a_power_of_the_size() -> None:
    for alpha in (0.0, 0.3, 0.7, 1.0):
        p = exponent(SIZES, alpha)
        assert sum(p.values()) == pytest.approx(1) and p["en"] >= p["de"] >= p["sw"]
        warm = {k: n ** (1 / (1 / alpha)) for k, n in SIZES.items()} if alpha else {}
        assert all(p[k] == pytest.approx(w / sum(warm.values())) for k, w in warm.items()), "T = 1 / alpha"
    assert exponent(SIZES, 1.0) == pytest.approx({k: n / 1110 for k, n in SIZES.items()})
    assert exponent(SIZES, 0.0) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


def test_unimax_is_its_greedy_definition() -> None:
    assert unimax(SIZES, 30, 4) == pytest.approx(dict.fromkeys(SIZES, 1 / 3)), "equal while nobody is at the limit"
    p = unimax(SIZES, 900, 4)  # sw: 40, de: min(430, 400) = 400, en: 460
    assert p == pytest.approx({"sw": 40 / 900, "de": 400 / 900, "en": 460 / 900})
    assert unimax(SIZES, 10**9, 4) == pytest.approx(exponent(SIZES, 1.0)), "with too large a budget all are at the limit"


def test_language_without_a_word_is_refused() -> None:
    with pytest.raises(UserError, match="sw has no words"):
        shares(SIZES | {"sw": 0}, "exponent", 0.3, 1.0, 1.0)
