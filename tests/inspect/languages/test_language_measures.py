"""The measures' exact properties: mixing identities, UniMax, rotations, projectors, effect sizes."""

import math

import numpy as np
import pytest

from modelwright.inspect.languages import balance, bias, erase, space

SIZES = {"en": 1000.0, "de": 300.0, "yo": 5.0, "cs": 60.0}
RNG = np.random.default_rng(0)
X, NOISE = RNG.normal(size=(40, 12)), RNG.normal(size=(40, 12))
Q = np.linalg.qr(RNG.normal(size=(12, 12)))[0]


# ---- balance ------------------------------------------------------------------------------------------------------------
def test_sampling_by_exponents() -> None:
    q = balance.shares(SIZES)
    assert sum(q.values()) == pytest.approx(1) and balance.tempered(SIZES, 1.0) == pytest.approx(q)
    assert balance.tempered(SIZES, 0.0) == pytest.approx(dict.fromkeys(SIZES, 0.25))
    p = balance.tempered(SIZES, 0.3)
    assert sorted(p, key=p.__getitem__) == sorted(SIZES, key=SIZES.__getitem__) and p["yo"] > q["yo"]
    powers = {k: v ** (1 / 2.5) for k, v in q.items()}  # a temperature of 2.5
    assert balance.tempered(SIZES, 0.4) == pytest.approx({k: v / sum(powers.values()) for k, v in powers.items()})


def test_unimax_is_its_greedy_definition() -> None:
    budget, epochs = 800.0, 4.0
    left, want = budget, {}
    for i, (name, size) in enumerate(sorted(SIZES.items(), key=lambda kv: kv[1])):
        want[name] = min(size * epochs, left / (4 - i))
        left -= want[name]
    plan = balance.unimax(SIZES, budget, epochs)
    assert plan == pytest.approx(want) and sum(plan.values()) == pytest.approx(budget)
    assert plan["yo"] == 20 and plan["en"] == plan["de"] == pytest.approx((800 - 20 - 240 * (240 < 260)) / 2)
    assert max(balance.passes(plan, SIZES).values()) <= epochs
    assert sum(balance.unimax(SIZES, 1e9, 2.0).values()) == pytest.approx(2 * sum(SIZES.values()))


def test_even_and_single_corpora_are_the_ends_of_each_measure() -> None:
    even, single = dict.fromkeys("abcd", 7.0), {"a": 1.0, "b": 0.0}
    assert math.exp(balance.entropy(even)) == pytest.approx(4) and balance.gini(even) == pytest.approx(0)
    assert balance.entropy(single) == 0 and balance.gini(single) == pytest.approx(0.5)
    assert balance.distance(even, even) == 0 and balance.distance({"a": 1.0}, {"b": 1.0}) == 1


# ---- space --------------------------------------------------------------------------------------------------------------
def test_a_rotated_moved_and_scaled_copy_is_the_same_space() -> None:
    assert space.cka(X, 3 * X @ Q + 5) == pytest.approx(1) and space.procrustes(X, 3 * X @ Q + 5) == pytest.approx(0, abs=1e-6)
    assert space.gromov_hausdorff(X, 2 * X @ Q) == pytest.approx(0, abs=1e-6)
    assert space.spectral_distance(X, 2 * X @ Q) == pytest.approx(0, abs=1e-9)


def test_noise_is_another_space() -> None:
    assert space.cka(X, NOISE) < 0.5 and space.procrustes(X, NOISE) > 0.5 and space.gromov_hausdorff(X, NOISE**3) > 0


def test_retrieval_finds_copies_and_not_noise() -> None:
    cosines = space.likeness(X, 2 * X)
    assert [space.precision_at_1(s) for s in (cosines, space.csls(cosines), space.margin(cosines))] == [1, 1, 1]
    assert space.precision_at_1(space.likeness(X, NOISE)) < 0.2


def test_csls_mends_a_hub() -> None:
    cosines = np.array([[0.9, 0.95], [0.5, 0.96]])  # the second column is near to everything
    assert space.precision_at_1(cosines) == 0.75 and space.precision_at_1(space.csls(cosines)) == 1
    there, back = cosines.mean(1, keepdims=True), cosines.mean(0, keepdims=True)
    assert np.allclose(space.csls(cosines), 2 * cosines - there - back)
    assert np.allclose(space.margin(cosines), cosines / ((there + back) / 2))


def test_anisotropy_is_the_mean_cosine_of_different_rows() -> None:
    pairs = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for i, a in enumerate(X) for j, b in enumerate(X) if i != j]
    assert space.anisotropy(X) == pytest.approx(np.mean(pairs)) and space.anisotropy(np.ones((5, 3))) == pytest.approx(1)


# ---- erasure ------------------------------------------------------------------------------------------------------------
LABELS = np.repeat([0, 1, 2], 60)
LANGUAGES = RNG.normal(size=(180, 20)) + 3 * RNG.normal(size=(3, 20))[LABELS]


def test_inlp_is_a_projector_after_which_the_probe_is_at_chance() -> None:
    p, curve = erase.inlp(LANGUAGES, LABELS, 3)
    assert np.allclose(p @ p, p) and np.allclose(p, p.T) and curve[0] == 1 and len(curve) > 2
    left = erase.fit(LANGUAGES @ p, LABELS, 3).accuracy(LANGUAGES @ p, LABELS)
    assert left == curve[-1] <= 1 / 3 + 2 * math.sqrt(2 / 9 / 180)
    assert np.linalg.matrix_rank(p) == 20 - 2 * (len(curve) - 1), "three classes have two directions of difference a round"


def test_leace_leaves_no_linear_trace_and_moves_less_than_inlp() -> None:
    move, mean = erase.leace(LANGUAGES, LABELS, 3)
    after = LANGUAGES - (LANGUAGES - mean) @ move
    assert np.allclose(erase.class_means(after, LABELS, 3), mean), "the classes have one mean"
    assert erase.fit(after, LABELS, 3).accuracy(after, LABELS) <= 1 / 3 + 0.2
    again = after - (after - mean) @ move
    assert np.allclose(again, after)
    p, _ = erase.inlp(LANGUAGES, LABELS, 3)
    assert np.square(after - LANGUAGES).sum() < np.square(LANGUAGES @ p - LANGUAGES).sum()


def test_centring_takes_the_mean_of_each_class_away() -> None:
    means = erase.class_means(LANGUAGES, LABELS, 3)
    assert np.allclose(erase.class_means(erase.centred(LANGUAGES, LABELS, means), LABELS, 3), 0)


# ---- bias ---------------------------------------------------------------------------------------------------------------
def _groups() -> list[np.ndarray]:
    return [RNG.normal(size=(n, 12)) for n in (5, 5, 4, 4)]


def test_weat_does_not_see_scale_or_rotation_and_turns_with_its_groups() -> None:
    x, y, a, b = _groups()
    d = bias.weat(x, y, a, b)
    assert bias.weat(*(2 * v @ Q for v in (x, y, a, b))) == pytest.approx(d) and abs(d) <= 2
    assert bias.weat(y, x, a, b) == pytest.approx(-d) == bias.weat(x, y, b, a)


def test_the_permutation_test_is_exact_for_small_sets() -> None:
    x, y, a, b = _groups()
    p, exact = bias.weat_p(x, y, a, b)
    q, _ = bias.weat_p(y, x, a, b)
    assert exact and 1 / 252 <= p <= 1 and p + q == pytest.approx(1 + 1 / 252, abs=2 / 252)
    strong = bias.weat_p(np.tile(a.mean(0), (5, 1)) + 0.01 * x, np.tile(b.mean(0), (5, 1)) + 0.01 * y, a, b)
    assert strong == (pytest.approx(1 / 252), True)


def test_drawn_permutations_come_near_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = _groups()
    p, _ = bias.weat_p(*groups)
    monkeypatch.setattr(bias, "EXACT", 10)
    drawn, exact = bias.weat_p(*groups)
    assert not exact and drawn == pytest.approx(p, abs=0.02)


def test_stereoset_and_crows_scores_have_their_ends() -> None:
    assert bias.icat(100, 50) == 100 and bias.icat(50, 50) == 50 and bias.icat(100, 100) == 0 == bias.icat(100, 0)
    more = np.array([1.0, 2.0, 0.0, 5.0])
    assert bias.preferred(more, more) == 50 and bias.preferred(more, more - 1) == 100 and bias.preferred(more - 1, more) == 0
    lms, ss = bias.stereoset(np.array([[-1.0, -2.0, -9.0], [-2.0, -1.0, -9.0]]))
    assert (lms, ss, bias.icat(lms, ss)) == (100, 50, 100)
