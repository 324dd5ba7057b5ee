"""Calibration: what is removed exactly, what must not matter, and the published procedure re-run word by word."""

import bisect
import json
import random

import numpy as np
import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.core.numbers.stats import spearman
from modelwright.reward.calibrate import Calibrator, cross_fit, mean_difference
from modelwright.reward.table.evidence import compare, rank_correlation
from modelwright.reward.table.scores import pairs


def data(n: int = 300, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, lengths and groups of n pairs; the bias saturates with length."""
    rng = np.random.default_rng(seed)
    length = np.exp(rng.normal(6, 0.7, 2 * n))
    length = np.round(length, -1) if ties else length
    return rng.normal(0, 1, 2 * n) + 3 * np.tanh(length / 600), length, np.tile(np.arange(n), 2)


def both(length: np.ndarray) -> dict[str, np.ndarray]:
    return {"length": length}


@pytest.mark.parametrize("frac", [0.3, 1.0])
def test_a_linear_bias_is_removed_exactly(frac: float) -> None:
    _, length, _ = data()
    s = 7 + 0.003 * length
    assert np.abs(Calibrator(frac=frac, it=0).fit(s, both(length)).apply(s, both(length))).max() < 1e-8


def test_a_linear_bias_of_one_feature_does_not_change_what_lwr_leaves() -> None:
    s, length, group = data()
    plain = Calibrator(it=0).fit(s, both(length)).apply(s, both(length))
    penalised = s - 0.001 * length
    assert np.abs(Calibrator(it=0).fit(penalised, both(length)).apply(penalised, both(length)) - plain).max() < 1e-8


@pytest.mark.parametrize("method", ["lwr", "mean", "penalty"])
@pytest.mark.parametrize("compat", ["none", "official"])
def test_a_shift_of_all_scores_leaves_every_margin(method: str, compat: str) -> None:
    s, length, group = data()
    c = Calibrator(method=method, compat=compat)
    a, b = (c.fit(x, both(length), group).apply(x, both(length), group) for x in (s, s + 1000))
    assert np.abs((a[:300] - a[300:]) - (b[:300] - b[300:])).max() < 1e-9


@pytest.mark.parametrize("method", ["lwr", "mean", "penalty"])
@pytest.mark.parametrize("compat", ["none", "official"])
def test_the_order_of_the_rows_does_not_matter(method: str, compat: str) -> None:
    s, length, group = data()
    p = np.random.default_rng(1).permutation(len(s))
    c = Calibrator(method=method, compat=compat)
    there = c.fit(s, both(length), group).apply(s, both(length), group)
    assert np.abs(c.fit(s[p], both(length[p]), group[p]).apply(s[p], both(length[p]), group[p]) - there[p]).max() < 1e-10


@pytest.mark.parametrize("method", ["lwr", "mean", "penalty"])
def test_alpha_zero_changes_nothing(method: str) -> None:
    s, length, group = data()
    assert np.array_equal(Calibrator(method=method, alphas=(0.0,)).fit(s, both(length), group).apply(s, both(length), group), s)


@pytest.mark.parametrize("method", ["lwr", "mean"])
def test_a_constant_feature_is_refused_with_a_sentence(method: str) -> None:
    s, length, group = data()
    with pytest.raises(UserError, match="all 600 values of the feature 'length' are equal, because no bias can be seen"):
        Calibrator(method=method).fit(s, both(np.full(600, 5.0)), group)


def test_official_lwr_equals_a_literal_rerun() -> None:
    sm = pytest.importorskip("statsmodels.api")
    s, length, group = data()
    table = sm.nonparametric.lowess(s, length, frac=0.5)
    fitted = Calibrator(frac=0.5, compat="official").fit(s, both(length))
    for q in (length, length[:50] - 3.7):  # seen, and between the seen ones
        literal = np.array([table[bisect.bisect_left(table[:, 0], x), 1] for x in q])
        assert np.abs(fitted.bias(both(q)) - literal).max() < 1e-8


def literal_window(s: np.ndarray, length: np.ndarray, alpha: float, ratio: float, minimum: int, shuffle: bool = False) -> np.ndarray:
    """The published RC-Mean, pair by pair; s and length hold the chosen ones first."""
    n = len(s) // 2
    half = np.mean([abs(length[i] - length[n + i]) for i in range(n)]) / ratio
    pool = [(length[i], s[i]) for i in range(2 * n)]
    if shuffle:
        random.shuffle(pool)
    pool = sorted(pool, key=lambda x: x[0])
    xs, ys = [x for x, _ in pool], [y for _, y in pool]
    out = s.copy()
    for i in range(n):
        a, b = (ys[bisect.bisect_left(xs, length[j] - half) : bisect.bisect_right(xs, length[j] + half) - 1] for j in (i, n + i))
        if len(a) >= minimum and len(b) >= minimum:
            out[i], out[n + i] = s[i] - alpha * np.mean(a), s[n + i] - alpha * np.mean(b)
    return out


@pytest.mark.parametrize(("ratio", "minimum", "alpha"), [(4.0, 20, 1.0), (8.0, 10, 0.7), (2.0, 40, 1.0)])
def test_official_window_equals_a_literal_rerun(ratio: float, minimum: int, alpha: float) -> None:
    s, length, group = data(ties=False)
    c = Calibrator(method="mean", alphas=(alpha,), ratio=ratio, min_calibrate_num=minimum, compat="official")
    ours, literal = c.fit(s, both(length), group).apply(s, both(length), group), literal_window(s, length, alpha, ratio, minimum)
    assert np.abs(ours - literal).max() < 1e-9 and (ours == s).any() and (ours != s).any(), "some pairs are left alone"


def test_official_window_with_ties_is_the_mean_over_the_published_shuffles() -> None:
    s, length, group = data(60, ties=True)
    c = Calibrator(method="mean", min_calibrate_num=5, compat="official").fit(s, both(length), group)
    random.seed(0)
    runs = np.mean([literal_window(s, length, 1.0, 4.0, 5, shuffle=True) for _ in range(3000)], axis=0)
    assert np.abs(c.apply(s, both(length), group) - runs).max() < 0.02


def test_the_window_holds_all_scores_within_reach() -> None:
    s, length, group = data()
    c = Calibrator(method="mean").fit(s, both(length), group)
    half = np.abs(length[:300] - length[300:]).mean() / 4
    assert c.biases[0].width == pytest.approx(half)
    near = [s[np.abs(length - x) <= half] for x in length]
    held = np.array([len(v) >= 20 for v in near])
    held = held & np.tile(held[:300] & held[300:], 2)
    literal = np.array([v.mean() for v in near])
    assert np.abs(c.bias(both(length), group) - np.where(held, literal, 0)).max() < 1e-10
    assert np.isfinite(c.bias(both(np.array([0.0, 1e9])))).all(), "without a group the nearest full window counts"


def test_mean_difference_is_the_mean_over_all_pairs_of_a_group() -> None:
    rng = np.random.default_rng(0)
    c, group = rng.normal(size=50), rng.integers(0, 9, 50) * 3
    pair = [abs(c[i] - c[j]) for i in range(50) for j in range(i) if group[i] == group[j]]
    every = [abs(c[i] - c[j]) for i in range(50) for j in range(i)]
    assert mean_difference(c, group) == pytest.approx(np.mean(pair)) and mean_difference(c) == pytest.approx(np.mean(every))


def test_several_features_are_removed_one_after_the_other() -> None:
    s, length, group = data()
    md = np.random.default_rng(3).poisson(5, 600).astype(float)
    s = s + 0.2 * md
    f = {"length": length, "markdown": md}
    c = Calibrator(("length", "markdown"), alphas=(1.0, 0.5)).fit(s, f, group)
    first = Calibrator().fit(s, both(length))
    rest = first.apply(s, both(length))
    second = Calibrator(("markdown",), alphas=(0.5,)).fit(rest, f)
    assert np.abs(c.apply(s, f, group) - second.apply(rest, f)).max() < 1e-12
    whole = Calibrator(("length", "markdown"), frac=0.3).fit(s, f, group).apply(s, f)
    assert max(abs(spearman(whole, x)) for x in f.values()) < 0.08 < spearman(s, md)


@pytest.mark.parametrize("method", ["lwr", "mean", "penalty"])
def test_a_saved_calibrator_is_the_same_calibrator(method: str, tmp_path) -> None:
    s, length, group = data()
    c = Calibrator(method=method, alphas=(0.9,)).fit(s, both(length), group)
    c.save(tmp_path / "c.json")
    again = Calibrator.load(tmp_path / "c.json")
    q = both(np.linspace(-10, 9000, 777))
    assert again == c and np.array_equal(again.bias(q), c.bias(q))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"modelwright": "other"}',
        '{"modelwright": "calibrator", "method": "lwr", "biases": [{"x": 1}]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_broken_calibrator_file_is_one_sentence(text: str, tmp_path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match="is no calibrator"):
        Calibrator.load(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("lwr", {"method": "loess"}, "'loess' is not a choice"),
        ("lwr", {"method": "mean"}, "a bias by mean holds count, total, width, x"),
        ("lwr", {"method": "penalty"}, "a penalty has no curve"),
        ("lwr", {"alphas": [True]}, "does not fit"),
        ("lwr", {"frac": 2}, "out of range"),
        ("lwr", {"width": "wide"}, "width is no width"),
        ("lwr", {"biases": []}, "no bias for each of its 1 features"),
        ("lwr", {"more": 1}, "unknown key"),
        ("lwr", {"x": [3, 1, 2]}, "x does not rise"),
        ("lwr", {"x": [1, 2, True]}, "x is no list of finite numbers"),
        ("lwr", {"y": [1, 2]}, "y holds 2 numbers for 3 of x"),
        ("lwr", {"y": [1, 2, float("nan")]}, "y is no list of finite numbers"),
        ("lwr", {"y": [1, 2, 10**400]}, "y is no list of finite numbers"),
        ("mean", {"count": [1, 0, 1]}, "count holds something that is no count"),
        ("mean", {"count": [1, 1.5, 1]}, "count holds something that is no count"),
        ("mean", {"width": -1}, "width is no width"),
    ],
)
def test_a_calibrator_that_was_changed_is_not_applied(method: str, change: dict, said: str, tmp_path) -> None:
    bias = {"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    if method == "mean":
        bias = {"x": [1.0, 2.0, 3.0], "count": [1, 1, 1], "total": [1.0, 2.0, 3.0], "width": 1.0}
    Calibrator(method=method).save(tmp_path / "c.json")
    plain = json.loads((tmp_path / "c.json").read_text()) | {"biases": [bias]}
    (tmp_path / "c.json").write_text(json.dumps(plain))
    Calibrator.load(tmp_path / "c.json")
    for key, value in change.items():
        into = bias if key in bias else plain
        into[key] = value
    (tmp_path / "c.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=f"is no calibrator, because .*{said}"):
        Calibrator.load(tmp_path / "c.json")


def test_a_fitted_calibrator_and_a_setting_that_contradicts_it_are_refused(tmp_path) -> None:
    s, length, group = data(20)
    rows = [
        {"scores_chosen": s[i], "scores_rejected": s[20 + i], "length_chosen": length[i], "length_rejected": length[20 + i]}
        for i in range(20)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Calibrator(frac=0.5).fit(s, both(length), group).save(tmp_path / "c.json")
    knobs = {"scores": tmp_path / "s.jsonl", "fitted": tmp_path / "c.json", "draws": 100}
    modelwright.run("reward.calibrate", to=tmp_path / "out", **knobs, frac=0.5)
    with pytest.raises(UserError, match="method=mean does not fit the fitted calibrator, because it has method=lwr"):
        modelwright.run("reward.calibrate", to=tmp_path / "other", **knobs, method="mean")


def test_a_few_pairs_that_agree_make_nothing_certain() -> None:
    two = pairs("x", np.array([2.0, 3.0]), np.array([1.0, 1.0]), {"length": (np.array([1.0, 2.0]), np.array([3.0, 4.0]))})
    found = compare({"raw": two.score, "worse": -two.score, "same": two.score + 1}, two, draws=100)
    assert found["raw"]["accuracy"] == 100 and found["raw"]["accuracy_interval"] == pytest.approx([34.24, 100], abs=0.01)
    low, high = found["worse"]["change_interval"]
    assert found["worse"]["change"] == -100 == low and high > 0, "two pairs that turned are no clear change"
    assert found["same"]["change_interval"] == [0, 0]


def test_cross_fitted_scores_do_not_know_their_own_group() -> None:
    s, length, group = data(100)
    table = pairs("x", s[:100], s[100:], {"length": (length[:100], length[100:])})
    out = cross_fit(Calibrator(), table, 5)
    table.score[7] += 50
    other = cross_fit(Calibrator(), table, 5)
    assert other[7] - out[7] == pytest.approx(50) and other[107] == pytest.approx(out[107]) and not np.allclose(other, out)
    with pytest.raises(UserError, match="101 folds of 100 groups"):
        cross_fit(Calibrator(), table, 101)


@pytest.mark.parametrize("seed", range(3))
def test_a_saturating_bias_falls_away_and_the_true_order_comes_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 2000
    length = np.exp(rng.normal(6.5, 0.6, 2 * n))
    quality = rng.normal(0, 1, 2 * n)
    s = quality + 3 * np.tanh(length / 800)
    right = quality[:n] > quality[n:]
    c = Calibrator(frac=0.3).fit(s, both(length))

    def accuracy(x: np.ndarray) -> float:
        return float(((x[:n] > x[n:]) == right).mean())

    after = c.apply(s, both(length))
    assert abs(spearman(after, length)) < 0.02 < 0.5 < spearman(s, length)
    assert accuracy(after) > max(accuracy(s), accuracy(s - 0.001 * length)) + 0.02


def test_sections_and_intervals_are_those_of_plain_counting() -> None:
    s, length, group = data()
    table = pairs("x", s[:300], s[300:], {"length": (length[:300], length[300:])}, ["a"] * 100 + ["b"] * 200)
    found = compare({"before": s, "after": -s}, table, {"accuracy": {"a": 1.0, "b": 1.0}, "a": {"a": 1.0}}, draws=2000)
    hits = s[:300] > s[300:]
    assert found["before"]["accuracy"] == pytest.approx(100 * (hits[:100].mean() + hits[100:].mean()) / 2)
    assert found["before"]["sections"] == {"a": pytest.approx(100 * hits[:100].mean())}
    assert found["after"]["change"] == pytest.approx(found["after"]["accuracy"] - found["before"]["accuracy"])
    assert found["after"]["mended"] == (~hits).sum() and found["after"]["broken"] == hits.sum()
    assert found["before"]["spearman"]["length"] == pytest.approx(spearman(s, length))
    low, high = compare({"before": s}, table, draws=2000)["before"]["accuracy_interval"]
    half = 196 * np.sqrt(hits.mean() * (1 - hits.mean()) / 300)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_a_weighted_rank_correlation_is_that_of_the_resample() -> None:
    s, length, _ = data(40)
    rows = np.random.default_rng(0).integers(0, 80, 80)
    weight = np.bincount(rows, minlength=80).astype(float)
    assert rank_correlation(s, length)(weight) == pytest.approx(spearman(s[rows], length[rows]))


def test_the_step_prints_both_and_its_output_feeds_it_again(tmp_path) -> None:
    s, length, _ = data()
    rows = [
        {"id": i, "scores_chosen": [s[i]], "scores_rejected": s[300 + i], "length_chosen": length[i], "length_rejected": length[300 + i]}
        for i in range(300)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = modelwright.run("reward.calibrate", scores=tmp_path / "s.jsonl", frac=0.3, to=tmp_path / "out")
    metrics = result.plain()["metrics"]
    fitted = Calibrator.load(tmp_path / "out" / "calibrator.json")
    out = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert np.array_equal([r["score"] for r in out], fitted.apply(s, both(length))) and out[0]["group"] == 0 and out[300]["label"] == 0
    assert metrics["before"]["spearman"]["length"] > 0.5 and abs(metrics["after"]["spearman"]["length"]) < 0.03
    assert metrics["after"]["accuracy_interval"][0] < metrics["after"]["accuracy"] < metrics["after"]["accuracy_interval"][1]
    assert "accuracy" in result.steps[0]["text"] and "Spearman" in result.steps[0]["text"]
    stiff = modelwright.run("reward.calibrate", scores=tmp_path / "s.jsonl", to=tmp_path / "stiff").steps[0]
    assert "is left: a smaller frac" in stiff["text"] and stiff["metrics"]["after"]["spearman"]["length"] > 0.1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page and "Score along length" in page
    again = modelwright.run("reward.calibrate", scores=tmp_path / "out" / "scores.jsonl", to=tmp_path / "again", folds=4)
    assert again.plain()["metrics"]["before"]["accuracy"] == pytest.approx(metrics["after"]["accuracy"])
    held = modelwright.run(
        "reward.calibrate", scores=tmp_path / "s.jsonl", to=tmp_path / "held", fitted=tmp_path / "out" / "calibrator.json"
    )
    assert (held.to / "scores.jsonl").read_text() == (tmp_path / "out" / "scores.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "scores", "feature", "said"),
    [
        ({"method": "mean"}, np.arange(12.0), np.arange(12.0), "no window holds 20 scores"),
        ({"frac": 0.1}, np.arange(12.0), np.arange(12.0), "frac=0.1 of 12 scores is fewer than 3"),
        ({}, np.r_[np.nan, np.arange(11.0)], np.arange(12.0), "row 1 of 'scores' is nan"),
        ({}, np.arange(12.0), np.r_[np.arange(11.0), np.inf], "row 12 of 'length' is inf"),
        ({}, np.r_[1e308, np.arange(11.0)], np.arange(12.0), "row 1 of 'scores' is 1e\\+308"),
        ({}, [10**400, *range(11)], np.arange(12.0), "'scores' holds something that is no number"),
        ({}, np.arange(12.0), np.arange(11.0), "'length' has shape"),
        ({}, ["a"] * 12, np.arange(12.0), "'scores' holds something that is no number"),
        ({"features": ("words",)}, np.arange(12.0), np.arange(12.0), "the feature 'words' is missing"),
        ({"alphas": (1.0, 1.0)}, np.arange(12.0), np.arange(12.0), "2 alphas for 1 features"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(settings: dict, scores, feature, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Calibrator(**settings).fit(scores, {"length": feature}, np.arange(12) // 2)


def test_an_unfitted_calibrator_says_so() -> None:
    with pytest.raises(UserError, match="not fitted"):
        Calibrator().apply(np.arange(3.0), {"length": np.arange(3.0)})
