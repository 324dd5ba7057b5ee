"""Length-controlled win rates (Dubois et al., arXiv 2404.04475) from recorded annotations, without the hub.

For model m and instruction i: logit p = w1 tanh((len_base - len_model) / std) + w2 difficulty_i + w3; the rate is the mean of
sigmoid(w2 difficulty_i + w3). The official difficulties and the two gamed baselines' rows that steady the official fit lie
on the hub. Ours instead:
- difficulties are a random effect, normal with mean 0; each is found by Newton's method, their variance by EM with
  Laplace's approximation, so that nothing is tuned to the leaderboard.
- with the official weights these are held; a model without a row there is fitted given the difficulties.
- without, weights and difficulties are fitted in turn by maximum likelihood (official: l1 with cross-validation), w1 being
  pulled to the models' median as strongly as the gamed rows would. Under ten models nothing tells difficulty from noise.
"""

from pathlib import Path

import numpy as np

from modelwright.core.errors import UserError
from modelwright.reward.suites.common import files
from modelwright.reward.table.scores import Source, finite, last

ROLES = ("model", "instruction", "preference", "len_base", "len_model", "output_1", "output_2", "generator_2", "score_base", "score_model")
ENOUGH = 10  # models, to tell difficulty from noise


class Annotations:
    """Preferences and lengths as matrices (models, instructions), NaN where there is none."""

    def __init__(self, path: Path, columns: dict[str, str]):
        rows: list[tuple[str, str, float, float, float, float, float]] = []
        for _, file in files(path):
            rows += _rows(Source(file, columns, roles=ROLES))
        self.models, m = _codes([r[0] for r in rows])
        self.instructions, i = _codes([r[1] for r in rows])
        twice = np.bincount(m * len(self.instructions) + i)
        if len(bad := np.flatnonzero(twice > 1)):
            who, what = divmod(int(bad[0]), len(self.instructions))
            raise UserError(
                f"{self.models[who]} has instruction {self.instructions[what][:60]!r} twice in {path}", how="drop one of the rows"
            )
        table = np.full((5, len(self.models), len(self.instructions)), np.nan)
        table[:, m, i] = np.array([r[2:] for r in rows]).T
        self.preference, self.len_base, self.len_model, self.score_base, self.score_model = table
        self.seen = np.isfinite(self.preference)
        if len(empty := np.flatnonzero(~self.seen.any(1))):
            raise UserError(f"{self.models[empty[0]]} has no preference in {path}", how="drop the model")
        gap = np.where(self.seen, self.len_base - self.len_model, np.nan)
        with np.errstate(invalid="ignore"):
            spread = np.nanstd(gap, axis=1, ddof=1, keepdims=True)
        self.tanh = np.nan_to_num(np.tanh(np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)))
        self.same = (np.nan_to_num(gap) == 0).all(1) & (np.where(self.seen, self.preference, 0.5) == 0.5).all(1)  # the baseline itself


def _rows(source: Source) -> list[tuple]:
    judged = source.has("score_model")
    names = source.get("model" if source.has("model") else "generator_2")
    n = len(names)
    if judged:
        scores = np.stack([source.numbers(f"score_{side}") for side in ("base", "model")])
        preference = sigmoid(scores[1] - scores[0])
    else:
        scores = np.full((2, n), np.nan)
        given = source.get("preference")
        there = [v for v in given if v is not None and v == v]
        p = finite(there, f"'preference' in {source.path}")
        if len(bad := np.flatnonzero((p != 0) & ((p < 1) | (p > 2)))):
            raise UserError(f"a preference of {source.path} is {p[bad[0]]}", "it must lie between 1 and 2, or be 0 for a draw")
        preference = np.full(n, np.nan)
        preference[[v is not None and v == v for v in given]] = np.where(p == 0, 1.5, p) - 1
    sides = (("len_base", "output_1"), ("len_model", "output_2"))
    lengths = [
        source.numbers(a) if source.has(a) else np.array([len(last(v, source.path, i)) for i, v in enumerate(source.get(b))], float)
        for a, b in sides
    ]
    return list(zip(map(str, names), map(str, source.get("instruction")), preference, *lengths, *scores, strict=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.exp(-np.logaddexp(0, -x))


def fit_difficulty(a: Annotations, w: np.ndarray, use: np.ndarray, given: bool = False) -> tuple[np.ndarray, float]:
    """Modes (instructions,) of the difficulties given weights w (models, 3) of the models in `use`, and their variance by
    EM; with `given` the modes are those for variance 1 and the variance is EM's next."""
    seen, p = a.seen & use[:, None], np.nan_to_num(a.preference)
    base, slope = w[:, :1] * a.tanh + w[:, 2:], w[:, 1:2]
    d, s2 = np.zeros(seen.shape[1]), 1.0
    for _ in range(200):
        before = s2
        for _ in range(50):
            q = sigmoid(base + slope * d)
            curve = (seen * slope**2 * q * (1 - q)).sum(0) + 1 / s2
            step = np.clip(((seen * slope * (p - q)).sum(0) - d / s2) / curve, -2, 2)
            d = d + step
            if np.abs(step).max() < 1e-9:
                break
        s2 = float(np.mean(d * d + 1 / curve))
        if given or abs(s2 - before) < 1e-9:
            break
    return d, s2


def fit_weights(a: Annotations, d: np.ndarray, centre: float, start: np.ndarray) -> np.ndarray:
    """w (models, 3) given the difficulties d. w1 is pulled to `centre` as strongly as the gamed rows would: 0.2 x n rows of
    near even preference, where p (1 - p) is 1/4."""
    m, n = a.seen.shape
    x = np.stack([a.tanh, np.broadcast_to(d, (m, n)), np.ones((m, n))], -1)  # (models, instructions, 3)
    p, w, pull = np.nan_to_num(a.preference), start, 0.2 * float(np.median((a.tanh**2).sum(1))) / 4
    ridge, goal = np.array([pull + 1e-3, 1e-3, 1e-3]), np.array([centre, 0.0, 0.0])
    for _ in range(60):
        q = sigmoid((x @ w[..., None])[..., 0])
        slope = np.einsum("mn,mni->mi", a.seen * (p - q), x) - ridge * (w - goal)
        curve = np.swapaxes(x * (a.seen * q * (1 - q))[..., None], 1, 2) @ x + np.diag(ridge)
        step = np.clip(np.linalg.solve(curve, slope[..., None])[..., 0], -2, 2)
        w = w + step
        if np.abs(step).max() < 1e-9:
            break
    return w


def length_controlled(a: Annotations, official: dict[str, list[float]] | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Preferences (models, instructions) at equal length, NaN where unseen, and the weights (models, 3).

    None under ten models: without difficulties the rates come out far too high (by 9 points for claude alone)."""
    held = np.array([m in (official or {}) for m in a.models]) & ~a.same
    w = np.array([(official or {}).get(m, [0.0, 1.0, 0.0]) for m in a.models])
    if held.sum() >= ENOUGH:
        d, _ = fit_difficulty(a, w, held)
        own = ~held & ~a.same
        if own.any():
            w[own] = fit_weights(a, d, float(np.median(w[held, 0])), np.zeros_like(w))[own]
    elif (~a.same).sum() >= ENOUGH:
        w, d = _alternate(a, ~a.same)
    else:
        return None
    w[a.same] = 0.0
    return np.where(a.seen, sigmoid(w[:, 1:2] * d + w[:, 2:]), np.nan), w


def _alternate(a: Annotations, use: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, before = np.tile([0.0, 1.0, 0.0], (len(use), 1)), np.zeros(len(use))
    for _ in range(500):
        d, variance = fit_difficulty(a, w, use, given=True)
        d = (d - d.mean()) / np.sqrt(variance)  # w2 holds the scale
        w = fit_weights(a, d, float(np.median(w[use, 0])), w)
        rate = sigmoid(w[:, 1:2] * d + w[:, 2:]).mean(1)
        if np.abs(rate - before).max() < 1e-5:
            break
        before = rate
    return w, d


def _codes(names: list[str]) -> tuple[list[str], np.ndarray]:
    known = {n: i for i, n in enumerate(dict.fromkeys(names))}
    return list(known), np.array([known[n] for n in names])
