"""AlpacaEval 2.0 win rates from recorded annotations: raw, length-controlled and penalised, without the hub.

Read is a table with a row per model and instruction: model, instruction, preference, and len_base, len_model (characters)
or the texts output_1, output_2; AlpacaEval's annotations.json (generator_2 is the model), or a folder of them. preference p
lies in [1, 2], 2 being a win over the baseline; 0 is a draw. With score_base and score_model instead of preference,
a reward model judges: p = sigmoid(score_model - score_base), and RC-LWR (frac 0.3) and RC-Mean (ratio 8, windows of 10)
stand beside, fitted on the models' responses and looked up at the baseline's lengths as well, as the calibration paper does.

Length control: see reward/suites/length_control.py; with `weights` (AlpacaEval's csv) or by our own fit. Intervals are over
instructions with the weights held, as the leaderboard's standard errors are.
Penalty: sigmoid(logit p - 0.001 (len_model - len_base)), the calibration paper's baseline. Gameability: standard deviation
over mean of a model's rates with its _verbose and _concise prompts, rescaled by the rates' spread against the raw ones'.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.numbers.stats import ranks, spearman
from modelwright.core.step import EvalResult, StepContext
from modelwright.reward.calibrate import Calibrator
from modelwright.reward.suites.length_control import ENOUGH, Annotations, length_controlled, sigmoid
from modelwright.reward.table.evidence import binned, percent_interval, shown
from modelwright.reward.table.scores import LARGEST

WEIGHTS = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")


@dataclass(frozen=True)
class Settings:
    """What reward.bench's settings say to this suite; see its Knobs. `frac` and `ratio` are the calibration paper's here."""

    leaderboard: str | None = None
    weights: str | None = None
    arena: tuple[str, ...] = ()
    frac: float = 0.3
    ratio: float = 8.0
    penalty: float = 0.001
    compat: Literal["none", "official"] = "none"
    draws: int = 1000


def alpacaeval(path: Path, columns: dict[str, str], knobs: Settings, job: StepContext) -> EvalResult:
    """Win rates of every model, their correlation with the leaderboard and the arena tables, rank changes."""
    a = Annotations(path, columns)
    rows = _table(knobs.weights, WEIGHTS) if knobs.weights else {}
    official = {m: [row[c] for c in WEIGHTS] for m, row in rows.items()}
    with job.progress.task("length-controlled win rates"):
        fit = length_controlled(a, official)
    gap = a.len_model - a.len_base
    p = np.clip(a.preference, 1e-7, 1 - 1e-7)
    each = {"raw": a.preference} | ({"length-controlled": fit[0]} if fit else {})
    each["penalty"] = sigmoid(np.log(p / (1 - p)) - knobs.penalty * gap)
    if np.isfinite(a.score_model).any():
        each |= _calibrated(a, knobs)
    rates = {k: 100 * np.nanmean(v, axis=1) for k, v in each.items()}
    place = {k: ranks(-v) for k, v in rates.items()}
    between = {k: _intervals(v, knobs.draws, job.seed) for k, v in each.items()}
    models: dict[str, Any] = {}
    for i, m in enumerate(a.models):
        seen = a.seen[i]
        models[m] = {"instructions": int(seen.sum()), "length": float(np.nanmean(a.len_model[i])), "weights": fit and fit[1][i].tolist()}
        for k, v in each.items():
            row = v[i][seen]
            error = float(100 * row.std(ddof=1) / np.sqrt(len(row))) if len(row) > 1 else None
            models[m][k] = {"win_rate": float(rates[k][i]), "standard_error": error, "interval": between[k][i], "rank": float(place[k][i])}
    board = _table(knobs.leaderboard, ("win_rate", "length_controlled_winrate")) if knobs.leaderboard else {}
    weights = None
    if fit:
        weights = "official" if official else "own fit"
    metrics: dict[str, Any] = {"suite": "alpacaeval", "weights": weights, "models": models}
    metrics["leaderboard"] = _errors(a.models, rates, board)
    metrics["correlation"] = {k: _correlations(a.models, v, board, knobs.arena) for k, v in rates.items()}
    metrics["gameability"] = {k: _gameability(a.models, v, rates["raw"]) for k, v in rates.items()}
    return _finding(a, each, metrics, gap)


def _calibrated(a: Annotations, knobs: Settings) -> dict[str, np.ndarray]:
    """Preferences by corrected rewards; the bias is fitted on the models' responses only."""
    seen, out = a.seen, {}
    width = float(np.abs(a.len_model - a.len_base)[seen].mean()) / knobs.ratio
    for k, method in (("lwr", "lwr"), ("mean", "mean")):
        c = Calibrator(method=method, frac=knobs.frac, width=width, min_calibrate_num=10, compat=knobs.compat)  # type: ignore[arg-type]
        c = c.fit(a.score_model[seen], {"length": a.len_model[seen]})
        both = np.r_[a.len_model[seen], a.len_base[seen]]
        rest = np.r_[a.score_model[seen], a.score_base[seen]] - c.bias({"length": both}, np.tile(np.arange(seen.sum()), 2))
        out[k] = np.full(seen.shape, np.nan)
        out[k][seen] = sigmoid(rest[: seen.sum()] - rest[seen.sum() :])
    return out


def _intervals(each: np.ndarray, draws: int, seed: int) -> list[list[float]]:
    """95 % bootstrap intervals over instructions of the rows' means, in percent; all models share the resamples."""
    n = each.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    seen = np.isfinite(each)
    means = (counts @ np.nan_to_num(each).T) / np.maximum(counts @ seen.T, 1)
    return [
        percent_interval(100 * sample, 100 * float(np.nanmean(row)), int(s.sum()))
        for sample, row, s in zip(means.T, each, seen, strict=True)
    ]


def _errors(models: list[str], rates: dict[str, np.ndarray], board: dict[str, dict[str, float]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, column in (("raw", "win_rate"), ("length-controlled", "length_controlled_winrate")):
        off = {m: abs(float(rates[k][i]) - board[m][column]) for i, m in enumerate(models) if m in board and k in rates}
        if off:
            worst = max(off, key=lambda m: off[m])
            out[k] = {"models": len(off), "mean_absolute_error": float(np.mean(list(off.values()))), "largest": off[worst], "at": worst}
    return out


def _correlations(models: list[str], rates: np.ndarray, board: dict[str, dict[str, float]], arena: tuple[str, ...]) -> dict[str, Any]:
    tables = {"leaderboard": {m: r["length_controlled_winrate"] for m, r in board.items()}} if board else {}
    for path in arena:
        tables |= _arena(Path(path))
    out = {}
    for name, of in tables.items():
        at = [i for i, m in enumerate(models) if m in of]
        if len(at) > 2:
            out[name] = {"models": len(at), "spearman": spearman(rates[at], np.array([of[models[i]] for i in at]))}
    return out


def _gameability(models: list[str], rates: np.ndarray, raw: np.ndarray) -> float | None:
    at = {m: i for i, m in enumerate(models)}
    trios = [[at[m], at[f"{m}_verbose"], at[f"{m}_concise"]] for m in models if {f"{m}_verbose", f"{m}_concise"} <= set(models)]
    plain = [i for m, i in at.items() if not m.endswith(("_verbose", "_concise"))]
    if not trios or len(plain) < 2 or not rates[plain].std() or not all(rates[t].mean() for t in trios):
        return None
    return float(100 * np.mean([rates[t].std(ddof=1) / rates[t].mean() for t in trios]) * raw[plain].std() / rates[plain].std())


def _table(path: str, columns: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{first column: {column: number}} of a csv."""
    rows = _csv(Path(path))
    if missing := [c for c in columns if c not in rows[0]]:
        raise UserError(f"{path} has no column '{missing[0]}'", how="give AlpacaEval's own csv")
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        model = next(iter(row.values()))
        if model in found:
            raise UserError(f"{model} stands twice in {path}", "its numbers could be either", "drop one")
        found[model] = {c: _number(row[c], c, path) for c in columns}
    return found


def _arena(path: Path) -> dict[str, dict[str, float]]:
    """{table: {model: rating}}: each column that starts with Arena."""
    rows = _csv(path)
    names = [c for c in rows[0] if c and c.startswith("Arena")]
    if not names:
        raise UserError(f"{path} has no column that starts with 'Arena'", how="give a csv of models and Arena scores")
    tables = {}
    for c in names:
        title = " ".join(f"{path.stem}, {c.removeprefix('Arena')}".split()) if len(names) > 1 else path.stem
        rated = [r for r in rows if (r[c] or "").strip()]
        tables[title] = {next(iter(r.values())): _number(r[c], c, str(path)) for r in rated}
    return tables


def _number(value: str | None, column: str, path: str) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST:
        raise UserError(f"'{column}' in {path} holds {repr(value)[:40]}", "a finite number is needed")
    return number


def _csv(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"no file at {path}", how="check the path")
    with open(path, encoding="utf-8", newline="") as file:  # published tables have rows of uneven length
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path} is empty", how="give a csv with at least one row")
    return rows


def _finding(a: Annotations, each: dict[str, np.ndarray], metrics: dict[str, Any], gap: np.ndarray) -> EvalResult:
    models, kinds = metrics["models"], list(each)
    best = "length-controlled" if "length-controlled" in kinds else "raw"
    order = sorted(models, key=lambda m: models[m][best]["rank"])
    rows = [
        [m, f"{models[m]['length']:.0f}", *(shown(models[m][k]["win_rate"], models[m][k]["interval"], 1) for k in kinds)]
        for m in order[:15]
    ]
    title = "Win rates, %" + (f" (first 15 of {len(order)}; all in --json)" if len(order) > 15 else "")
    tables: list[dict[str, Any]] = [{"title": title, "columns": ["model", "length", *kinds], "rows": rows}]
    moved = sorted(order, key=lambda m: -abs(models[m]["raw"]["rank"] - models[m][best]["rank"]))[:5]
    rows = [[m, f"{models[m]['length']:.0f}", f"{models[m]['raw']['rank']:g}", f"{models[m][best]['rank']:g}"] for m in moved]
    if best != "raw":
        tables.append({"title": "Largest changes of rank", "columns": ["model", "length", "raw", best], "rows": rows})
    if found := metrics["correlation"]["raw"]:
        rows = [[t, r["models"], *(f"{metrics['correlation'][k][t]['spearman']:.3f}" for k in kinds)] for t, r in found.items()]
        games = metrics["gameability"]
        if games["raw"] is not None:
            cells = ["" if games[k] is None else f"{games[k]:.1f}" for k in kinds]
            rows.append(["gameability, % (lower is better)", "", *cells])
        tables.append({"title": "Spearman's correlation with other tables", "columns": ["", "models", *kinds], "rows": rows})
    errors = metrics["leaderboard"]
    if errors:
        rows = [[k, e["models"], f"{e['mean_absolute_error']:.2g}", f"{e['largest']:.2g}", e["at"]] for k, e in errors.items()]
        columns = ["win rate", "models", "mean absolute error", "largest", "at"]
        tables.append({"title": "Against the leaderboard, points", "columns": columns, "rows": rows})
    text = f"Win rates of {len(order)} models; "
    if best == "raw":
        text += f"length control needs {ENOUGH} models or more, to tell an instruction's difficulty from noise."
    else:
        off = f", {errors[best]['mean_absolute_error']:.2f} points from the leaderboard's on average" if errors else ""
        text += f"length-controlled with {'the official weights' if metrics['weights'] == 'official' else 'weights of our own fit'}{off}."
    series = {k: binned(gap[a.seen], v[a.seen]) for k, v in each.items()}
    title = "Preference along the difference in length"
    plot = {"kind": "line", "title": title, "x": "characters, model less baseline", "y": "less the overall mean", "series": series}
    return EvalResult(metrics, text, tables=tables, plots=[plot])
