"""What a correction did: correlation with each feature and accuracy, before and after, with intervals over prompts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from modelwright.core.numbers.stats import wilson
from modelwright.core.step import EvalResult
from modelwright.reward.table.scores import Scores

Heads = dict[str, dict[str, float]]  # a headline number as a weighted mean of the accuracy of parts


def rank_correlation(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], float]:
    """Spearman's correlation of x and y (n,) as a function of each row's weight (n,) in a resample; 0 for a constant."""
    (kx, ix), (ky, iy) = np.unique(x, return_inverse=True), np.unique(y, return_inverse=True)

    def ranks(where: np.ndarray, kinds: int, weight: np.ndarray, middle: float) -> np.ndarray:
        held = np.bincount(where, weight, kinds)
        return (np.cumsum(held) - (held - 1) / 2 - middle)[where]

    def correlation(weight: np.ndarray) -> float:
        middle = (weight.sum() + 1) / 2
        a, b = ranks(ix, len(kx), weight, middle), ranks(iy, len(ky), weight, middle)
        wa = weight * a
        scale = np.sqrt((wa @ a) * ((weight * b) @ b))
        return float(wa @ b / scale) if scale > 0 else 0.0

    return correlation


def compare(
    columns: dict[str, np.ndarray], s: Scores, heads: Heads | None = None, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """For each column of scores (n,): accuracy in percent, Spearman's correlation with each feature, the change of accuracy
    against the first column, each with a 95 % bootstrap interval over groups; and the comparisons that changed side.

    A tie counts as wrong. `heads` names weighted means of the parts' accuracies and the first is "accuracy"; without it,
    accuracy is the share of all comparisons. draws falls from 20,000 responses on, to 100 at least.
    """
    size = np.bincount(s.part, minlength=len(s.parts)).astype(float)
    heads = heads or {"accuracy": dict(zip(s.parts, size, strict=True))}
    mix = np.array([[h.get(p, 0.0) for p in s.parts] for h in heads.values()])  # (heads, parts)
    mix = mix * (size > 0)
    right = {name: c[s.better] > c[s.worse] for name, c in columns.items()}
    ranks = [rank_correlation(c, f) for c in columns.values() for f in s.features.values()]
    groups = int(s.group.max()) + 1

    def statistic(weight: np.ndarray) -> np.ndarray:
        row, pair = weight[s.group], weight[s.group[s.better]]
        found = [r(row) for r in ranks]
        if len(s.better):
            n = np.bincount(s.part, pair, len(s.parts))
            seen = mix * (n > 0)  # a part may be missing from a resample
            for r in right.values():
                hits = np.bincount(s.part, pair * r, len(s.parts)) / np.maximum(n, 1e-12)
                found += list(100 * (seen @ hits) / np.maximum(seen.sum(1), 1e-12))
        return np.array(found)

    rng = np.random.default_rng(seed)
    draws = int(np.clip(2e7 / len(s.score), 100, draws))
    whole = statistic(np.ones(groups))
    sample = np.array([statistic(np.bincount(rng.integers(0, groups, groups), minlength=groups).astype(float)) for _ in range(draws)])
    k, h, first = len(s.features), len(heads), len(columns) * len(s.features)
    out: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(columns):
        row: dict[str, Any] = {}
        if len(s.better):
            at, base = first + i * h, sample[:, first]
            row |= {"accuracy": float(whole[at]), "accuracy_interval": percent_interval(sample[:, at], float(whole[at]), groups)}
            change = float(whole[at] - whole[first])
            row |= {"change": change, "change_interval": _change_interval(sample[:, at] - base, change, groups)}
            row["sections"] = {n: float(whole[at + j]) for j, n in enumerate(heads) if j}
            reference = next(iter(right.values()))
            row |= {"mended": int((right[name] & ~reference).sum()), "broken": int((~right[name] & reference).sum())}
            row["ties"] = int((columns[name][s.better] == columns[name][s.worse]).sum())
        for j, f in enumerate(s.features):
            row.setdefault("spearman", {})[f] = float(whole[i * k + j])
            row.setdefault("spearman_interval", {})[f] = _interval(sample[:, i * k + j])
        out[name] = row
    return out


def _interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]


def percent_interval(sample: np.ndarray, value: float, n: int) -> list[float]:
    """95 % interval of a percentage from its resamples. Where they are all the same it is Wilson's over the n groups: that a few
    pairs agree makes nothing certain."""
    low, high = _interval(sample)
    if high - low > 1e-9:
        return [low, high]
    return [100 * v for v in wilson(n * value / 100, n)]


def _change_interval(sample: np.ndarray, change: float, n: int) -> list[float]:
    """The same for a change between -100 and 100 points; a change of nothing in no resample is nothing."""
    if not change and not sample.any():
        return [0.0, 0.0]
    low, high = percent_interval((sample + 100) / 2, (change + 100) / 2, n)
    return [2 * low - 100, 2 * high - 100]


def shown(value: float, interval: list[float], digits: int = 2) -> str:
    """59.43 (54.3, 64.6): the interval has one digit less"""
    low, high = (f"{v:.{digits - 1}f}" for v in interval)
    return f"{value:.{digits}f} ({low}, {high})"


def binned(feature: np.ndarray, score: np.ndarray, bins: int = 20) -> list[list[float]]:
    """Mean score, less the mean of all, over bins of equal size along the feature."""
    order = np.argsort(feature, kind="stable")
    parts = [p for p in np.array_split(order, min(bins, len(order))) if len(p)]
    return [[float(feature[p].mean()), float(score[p].mean() - score.mean())] for p in parts]


def plot(s: Scores, columns: dict[str, np.ndarray], feature: str, title: str) -> dict[str, Any]:
    """Mean score along a feature, a line per column."""
    series = {name: binned(s.features[feature], c) for name, c in columns.items()}
    return {"kind": "line", "title": title, "x": feature, "y": "mean score, less the overall mean", "series": series}


def findings(s: Scores, columns: dict[str, np.ndarray], found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> EvalResult:
    """The finding of one correction: columns "before" and "after"."""
    before, after = found["before"], found["after"]
    falls = ", ".join(f"Spearman with {f} {before['spearman'][f]:.3f} -> {after['spearman'][f]:.3f}" for f in s.features)
    rows = [
        [f"Spearman(score, {f})", *(shown(m["spearman"][f], m["spearman_interval"][f], 3) for m in (before, after))] for f in s.features
    ]
    if len(s.better):
        low, high = after["change_interval"]
        sure = "" if low > 0 or high < 0 else "; no clear change"
        text = f"{falls}; accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f} % (change {low:+.2f} to {high:+.2f}{sure})."
        rows.append(["accuracy, %", *(shown(m["accuracy"], m["accuracy_interval"]) for m in (before, after))])
        rows.append(["ties", before["ties"], after["ties"]])
        rows.append(["comparisons that changed", "", f"{after['mended']} to right, {after['broken']} to wrong"])
    else:
        text = f"{falls}; accuracy unknown: the file has no group and label, or no preferred side."
    for f in s.features:
        low, high = after["spearman_interval"][f]
        if (low > 0 or high < 0) and abs(after["spearman"][f]) > 0.03:
            text += f" A correlation with {f} is left: a smaller frac follows a bent bias more closely."
    table = {"title": "Before and after, with 95 % intervals", "columns": ["", "before", "after"], "rows": rows}
    plots = [plot(s, columns, f, f"Score along {f}") for f in s.features]
    return EvalResult({**facts, **found}, text, tables=[table], plots=plots, facts=facts)
