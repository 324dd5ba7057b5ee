"""Post-hoc reward calibration: take a known bias (length, markdown) out of recorded reward scores, without training.

Use it on scores of any reward model, before ranking, judging or picking preference pairs. The correlation with the feature
goes as far as the curve can follow the bias (a strongly bent one wants a smaller frac); whether accuracy rises depends on
whether the feature was a bias or a sign of quality. So both are printed, with intervals.

Paper: Huang et al., Post-hoc Reward Calibration: A Case Study on Length Bias, ICLR 2025, arXiv 2409.17407.
A score is a true reward plus a bias that depends on a feature c of the response: r = r* + b(c). Where r* does not
depend on c locally, b(c) is the local mean of r, and r - alpha b(c) is what remains. Two estimates of b:
- lwr (RC-LWR): locally weighted regression of all scores on c, see core/numbers/curves.py; frac 1.0 on RewardBench, 0.3 on AlpacaEval.
- mean (RC-Mean): the mean of all scores with |c' - c| <= d, d = mean |c_chosen - c_rejected| / ratio; a pair is left
  alone unless both its windows hold min_calibrate_num scores. Ratio 4 and 20 scores on RewardBench, 8 and 10 on AlpacaEval.
- penalty: the baseline, 0.001 a character. Several features are treated one after the other, each with its alpha.

The official code (ZeroYuHuang/Reward-Calibration) differs from the paper in places; compat="official" follows the first two:
- its window loses its largest element (slice [left : right - 1]). The pool is shuffled, so among equal features a random
  one is lost; here the mean over those draws is taken, which no order can change.
- LWR is looked up at the first fitted feature not below c, instead of between neighbours; beyond the last one it fails,
  here the last value holds.
- RC-Mean with several features starts each from the raw scores on RewardBench, so that only the last one counts;
  LWR + penalty on AlpacaEval penalises the baseline with the model's length, so that the penalty cancels. Neither is followed.
- its penalty counts characters of prompt and response with the chat template; here it counts the feature that is given.

Ours: a fitted calibrator that is saved, loaded and applied elsewhere; cross-fitting (the paper fits on the scores that
it corrects); bootstrap intervals over prompts; groups of any size (d is then the mean difference within a group, and a
group is left alone as a whole); `delta` for more than 10,000 different feature values; for a response without a group
whose window is thin, the bias at the nearest feature value with a full window.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError, short
from modelwright.core.knobs import build, knob
from modelwright.core.numbers.curves import Curve, lowess
from modelwright.core.step import EvalResult, StepContext
from modelwright.reward.table.biases import Bias, Window, from_plain, is_number, mean_difference, to_plain
from modelwright.reward.table.evidence import compare, findings
from modelwright.reward.table.scores import Scores, checked, read

SETTINGS = ("method", "frac", "it", "delta", "ratio", "min_calibrate_num", "penalty", "compat")  # that a calibrator takes as they are


@dataclass(frozen=True)
class Knobs:
    scores: str = knob(help="jsonl, json, csv or parquet, plain or .gz: a row per pair, or a row per response", path=True)
    columns: dict[str, str] = knob(
        {}, "role: column, for scores_chosen, scores_rejected, text_chosen, text_rejected, or score, text, group, label; id, subset"
    )
    features: list[str] = knob(["length"], "biases to remove, in this order: columns, or length (characters), words, markdown, tokens")
    method: Literal["lwr", "mean", "penalty"] = knob("lwr", "how the bias is estimated")
    alphas: list[float] = knob([1.0], "share of the bias to remove: one for all features, or one each")
    frac: float = knob(1.0, "lwr: share of the scores under each line", low=0, high=1)
    it: int = knob(3, "lwr: rounds of robust reweighting", low=0)
    delta: float | None = knob(
        None, "lwr: interpolate within this distance; empty: 0, and 1 % of the middle 98 % from 10,000 different values on", low=0
    )
    ratio: float = knob(4.0, "mean: half a window is the mean difference within a pair, divided by this", low=1e-6)
    min_calibrate_num: int = knob(20, "mean: scores that a window must hold", low=1)
    penalty: float = knob(0.001, "penalty: reward per unit of the feature")
    compat: Literal["none", "official"] = knob("none", "official: the window and the look-up of the published code")
    folds: int = knob(
        0, "0: fit on the scores that are corrected, as the paper does; k: correct each k-th part by a fit to the others", low=0
    )
    fitted: str | None = knob(None, "calibrator.json of an earlier run: apply it, fit nothing", path=True)
    tokenizer: str | None = knob(None, "tokenizer.json or its folder, for the feature tokens", path=True)
    draws: int = knob(1000, "bootstrap resamples; fewer from 20,000 responses on", low=100)


@dataclass(frozen=True)
class Calibrator:
    """Settings (see Knobs), and after `fit` one bias per feature. `fit` returns a new one; nothing is changed in place."""

    features: tuple[str, ...] = ("length",)
    method: Literal["lwr", "mean", "penalty"] = "lwr"
    alphas: tuple[float, ...] = (1.0,)
    frac: float = 1.0
    it: int = 3
    delta: float | None = None
    ratio: float = 4.0
    min_calibrate_num: int = 20
    width: float | None = None  # half a window, instead of the mean difference within a group / ratio
    penalty: float = 0.001
    compat: Literal["none", "official"] = "none"
    biases: tuple[Bias, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.features or len(self.alphas) not in (1, len(self.features)):
            raise UserError(f"{len(self.alphas)} alphas for {len(self.features)} features", how="give one alpha for all, or one each")

    def fit(self, scores: np.ndarray, features: dict[str, np.ndarray], group: np.ndarray | None = None) -> "Calibrator":
        """Estimate each feature's bias from scores (n,) and features, each (n,).

        group: (n,) int, which responses are compared with each other (both sides of a pair have one number); without it
        all are. Raises UserError for equal features, values that are no finite numbers, or too few scores.
        """
        rest = checked("scores", scores, len(scores))
        biases: list[Bias] = []
        for i, (name, alpha) in enumerate(self._alphas(), 1):
            c = checked(name, self._feature(features, name), len(rest))
            biases.append(self._fit_one(name, rest, c, group))
            if i < len(self.features):  # the next feature sees what this one leaves
                rest = rest - alpha * self._height(biases[-1], c, group)
        return replace(self, biases=tuple(biases))

    def bias(self, features: dict[str, np.ndarray], group: np.ndarray | None = None) -> np.ndarray:
        """What `apply` subtracts, (n,): the sum of alpha b(c) over the features."""
        if len(self.biases) != len(self.features):
            raise UserError("the calibrator is not fitted", how="call fit(scores, features) first and use what it returns")
        parts = []
        for (name, alpha), bias in zip(self._alphas(), self.biases, strict=True):
            c = np.asarray(self._feature(features, name), np.float64)
            parts.append(alpha * self._height(bias, c, group))
        return np.sum(parts, axis=0)

    def apply(self, scores: np.ndarray, features: dict[str, np.ndarray], group: np.ndarray | None = None) -> np.ndarray:
        """Scores (n,) without the bias; NaN stays NaN."""
        return np.asarray(scores, np.float64) - self.bias(features, group)

    def save(self, path: str | Path) -> None:
        """Write the fitted calibrator as json."""
        plain = {k: v for k, v in asdict(self).items() if k != "biases"}
        content = {"modelwright": "calibrator", **plain, "biases": [to_plain(b) for b in self.biases]}
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Calibrator":
        """Read what `save` wrote. Raises UserError for a file that is no calibrator, or not a whole one."""
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(plain, dict) or plain.pop("modelwright", None) != "calibrator":
                raise ValueError("it was not written by Calibrator.save")
            biases, width = plain.pop("biases"), plain.pop("width")
            knobs: Knobs = build(Knobs, {"scores": "", **plain}, "calibrator")  # the same types and bounds
            if width is not None and not (is_number(width) and width >= 0):
                raise ValueError("width is no width")
            settings = {name: getattr(knobs, name) for name in SETTINGS}
            if not isinstance(biases, list) or len(biases) != len(knobs.features):
                raise ValueError(f"it holds no bias for each of its {len(knobs.features)} features")
            fitted = tuple(from_plain(knobs.method, b) for b in biases)
            return cls(tuple(knobs.features), alphas=tuple(knobs.alphas), width=width, **settings, biases=fitted)
        except (OSError, ValueError, KeyError, RecursionError, UserError) as error:
            raise UserError(f"{path} is no calibrator", short(error), "give the calibrator.json of reward.calibrate") from None

    def _alphas(self) -> list[tuple[str, float]]:
        return list(zip(self.features, self.alphas * (len(self.features) if len(self.alphas) == 1 else 1), strict=True))

    def _feature(self, features: dict[str, np.ndarray], name: str) -> np.ndarray:
        if name not in features:
            raise UserError(f"the feature '{name}' is missing", f"given are {', '.join(features) or 'none'}")
        return features[name]

    def _fit_one(self, name: str, scores: np.ndarray, c: np.ndarray, group: np.ndarray | None) -> Bias:
        """The bias of one feature c (n,)."""
        if self.method == "penalty":
            return None
        if not len(c) or c.min() == c.max():
            raise UserError(f"all {len(c)} values of the feature '{name}' are equal", "no bias can be seen in it", "drop the feature")
        if self.method == "lwr":
            return self._lwr(scores, c)
        return self._mean(scores, c, group)

    def _height(self, bias: Bias, c: np.ndarray, group: np.ndarray | None) -> np.ndarray:
        """b(c), (n,)"""
        official = self.compat == "official"
        if bias is None:
            return self.penalty * c
        if isinstance(bias, Curve):
            return bias.step(c) if official else bias(c)
        height, count = bias(c, official)
        thin = count < self.min_calibrate_num
        if group is not None:
            return np.where(np.isin(group, group[thin]), 0.0, height)  # a group is left alone as a whole
        at_knots, held = bias(bias.x, official)
        thick = held >= self.min_calibrate_num
        return np.where(thin, np.interp(c, bias.x[thick], at_knots[thick]), height)

    def _lwr(self, scores: np.ndarray, c: np.ndarray) -> Curve:
        if int(self.frac * len(c) + 1e-10) < 3:
            raise UserError(
                f"frac={self.frac} of {len(c)} scores is fewer than 3", "a line needs more under it", "raise frac or give more scores"
            )
        delta = self.delta
        if delta is None:
            low, high = np.quantile(c, [0.01, 0.99])
            delta = 0.01 * (high - low) if len(np.unique(c)) > 10_000 else 0.0
        return lowess(c, scores, frac=self.frac, it=self.it, delta=float(delta))

    def _mean(self, scores: np.ndarray, c: np.ndarray, group: np.ndarray | None) -> Window:
        x, where, count = np.unique(c, return_inverse=True, return_counts=True)
        width = mean_difference(c, group) / self.ratio if self.width is None else self.width
        found = Window(x, count, np.bincount(where, scores), float(width))
        most = found(x, self.compat == "official")[1].max()
        if most < self.min_calibrate_num:
            why = f"the fullest of {len(c)} scores holds {most}, +- {width:.4g} wide"
            raise UserError(
                f"no window holds {self.min_calibrate_num} scores", why, "lower min_calibrate_num or ratio, or give more scores"
            )
        return found


def cross_fit(calibrator: Calibrator, s: Scores, folds: int, seed: int = 0) -> np.ndarray:
    """Corrected scores (n,): those of each fold of groups by a fit to the other folds."""
    groups = int(s.group.max()) + 1
    if not 2 <= folds <= groups:
        raise UserError(
            f"{folds} folds of {groups} groups", "each fold needs a group, and a fit needs another fold", "choose folds from 2 up"
        )
    fold = (np.random.default_rng(seed).permutation(groups) % folds)[s.group]
    out = np.empty(len(s.score))
    for k in range(folds):
        rest, held = fold != k, fold == k
        fitted = calibrator.fit(s.score[rest], {f: c[rest] for f, c in s.features.items()}, s.group[rest])
        out[held] = fitted.apply(s.score[held], {f: c[held] for f, c in s.features.items()}, s.group[held])
    return out


def calibrate(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write scores.jsonl (a row per response: score, raw, features) and calibrator.json into the job's folder."""
    if knobs.fitted:
        calibrator = _fitted(knobs)
        s = read(knobs.scores, list(calibrator.features), knobs.columns, knobs.tokenizer)
        after = calibrator.apply(s.score, s.features, s.group)
    else:
        s = read(knobs.scores, knobs.features, knobs.columns, knobs.tokenizer)
        settings = {name: getattr(knobs, name) for name in SETTINGS}
        unfitted = Calibrator(tuple(knobs.features), alphas=tuple(knobs.alphas), **settings)
        calibrator = unfitted.fit(s.score, s.features, s.group)
        after = cross_fit(unfitted, s, knobs.folds, job.seed) if knobs.folds else calibrator.apply(s.score, s.features, s.group)
    after = checked("corrected scores", after, len(s.score))
    calibrator.save(job.folder / "calibrator.json")
    columns: dict[str, list[Any]] = {**s.ids, "score": after.tolist(), "raw": s.score.tolist()}
    columns |= {f: c.tolist() for f, c in s.features.items()}
    with open(job.folder / "scores.jsonl", "w", encoding="utf-8") as out:
        for row in zip(*columns.values(), strict=True):
            out.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
    with job.progress.task("bootstrap"):
        found = compare({"before": s.score, "after": after}, s, draws=knobs.draws, seed=job.seed)
    facts = {"responses": len(s.score), "comparisons": len(s.better), "untouched": int((after == s.score).sum())}
    return findings(s, {"before": s.score, "after": after}, found, facts)


def _fitted(knobs: Knobs) -> Calibrator:
    """The calibrator that was fitted before. Raises UserError where a setting that was given says something else."""
    found = Calibrator.load(knobs.fitted or "")
    usual = Knobs(scores="")
    for name in ("features", "alphas", *SETTINGS):
        given, has = getattr(knobs, name), getattr(found, name)
        has = list(has) if isinstance(has, tuple) else has
        if given not in (getattr(usual, name), has):
            raise UserError(f"{name}={given} does not fit the fitted calibrator", f"it has {name}={has}", f"leave {name} out, or fit anew")
    return found


METHOD = calibrate
