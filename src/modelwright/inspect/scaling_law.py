"""A scaling law per domain, loss(N) = a / N^b + c, and the losses that it predicts at other sizes (Sheared-LLaMA, 2310.06694).

When to use it: dynamic batch loading needs a reference loss for each domain at a size that nobody has trained. Sheared-LLaMA fits the
losses of LLaMA2-7B, 13B and 70B and reads the curve at 1.3B and 2.7B.

The file is json: {"model_params": [N, ...], "losses": {domain: [loss at each N]}}; "targets" may be sizes, or sizes with the losses that
are known there, {N: [loss of each domain]}, and then the two are compared.

The fit: for a given b the law is linear in a and c, so b alone is searched (least squares, no starting point; the official notebook
starts scipy's curve_fit at a = 406.4, b = 0.336, c = 0.69). With three sizes the curve passes through all points, whatever the truth
is; c may then be negative, so it is a way to extrapolate and no law. Both are said in the report.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext

_LOW, _HIGH = 1e-4, 4.0  # range of b


@dataclass(frozen=True)
class Knobs:
    losses: str = knob(help="json file with model_params and losses by domain", path=True)
    targets: list[float] = knob([], "parameters to predict at; empty: the file's own targets")


@dataclass(frozen=True)
class Law:
    """loss(N) = a / N^b + c, with the root mean squared error of the fit."""

    a: float
    b: float
    c: float
    error: float

    def __call__(self, n: float) -> float:
        return self.a / n**self.b + self.c


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Law:
    """The least-squares law through three points or more. UserError where no falling curve with b > 0 fits."""
    n, y = np.asarray(sizes, float), np.asarray(losses, float)
    scale = float(np.exp(np.log(n).mean()))  # (N / scale)^-b keeps a and c of like size

    def linear(b: float) -> tuple[float, float, float]:
        x = (n / scale) ** -b
        dx, dy = x - x.mean(), y - y.mean()
        a = float(dx @ dy / (dx @ dx))
        return float(((dy - a * dx) ** 2).sum()), a, float(y.mean() - a * x.mean())

    grid = np.geomspace(_LOW, _HIGH, 400)
    best = int(np.argmin([linear(b)[0] for b in grid]))
    if best in (0, len(grid) - 1):
        raise UserError(
            f"no curve a / N^b + c fits the losses {[float(v) for v in y]}",
            f"the best b lies at the end of its range, {grid[best]:g}",
            "give losses that fall with the size, ever more slowly",
        )
    b = float(_golden(lambda b: linear(b)[0], grid[best - 1], grid[best + 1]))
    error, a, c = linear(b)
    if a <= 0:
        raise UserError(f"the losses {[float(v) for v in y]} rise with the size", "a scaling law falls", "check the order of the columns")
    return Law(a * scale**b, b, c, math.sqrt(error / len(y)))


def _golden(f: Any, low: float, high: float) -> float:
    """The minimum of a function with one valley between low and high."""
    ratio = (math.sqrt(5) - 1) / 2
    x, y = high - ratio * (high - low), low + ratio * (high - low)
    fx, fy = f(x), f(y)
    for _ in range(80):
        if fx < fy:
            high, y, fy = y, x, fx
            x = high - ratio * (high - low)
            fx = f(x)
        else:
            low, x, fx = x, y, fy
            y = low + ratio * (high - low)
            fy = f(y)
    return (low + high) / 2


def scaling_law(knobs: Knobs, job: StepContext) -> EvalResult:
    """The law of each domain and its losses at the targets, compared with known ones where the file has them."""
    sizes, losses, known = _read(Path(knobs.losses), knobs.targets)
    laws = {domain: fit(sizes, values) for domain, values in losses.items()}
    predicted = {f"{n:.0f}": {d: law(n) for d, law in laws.items()} for n in known}
    metrics: dict[str, Any] = {
        "laws": {d: vars(law) for d, law in laws.items()},
        "predicted": {n: {d: round(v, 4) for d, v in row.items()} for n, row in predicted.items()},
    }
    differences = [
        abs(round(predicted[f"{n:.0f}"][d], 4) - value) for n, row in known.items() for d, value in zip(laws, row or [], strict=False)
    ]
    if differences:
        metrics |= {"compared": len(differences), "equal_to_four_digits": sum(bool(x < 5e-5) for x in differences)}
        metrics["largest_difference"] = float(max(differences))
    return _finding(sizes, losses, laws, predicted, metrics)


def _read(path: Path, targets: list[float]) -> tuple[list[float], dict[str, list[float]], dict[float, list[float] | None]]:
    """Sizes, losses by domain, and targets with the losses known there (None: none)."""
    if not path.is_file():
        raise UserError(f"no file at {path}", how="check the path")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        sizes = [float(n) for n in raw["model_params"]]
        losses = {str(d): [float(v) for v in values] for d, values in raw["losses"].items()}
        given = raw.get("targets") or {}
        known: dict[float, list[float] | None] = {float(n): given[n] if isinstance(given, dict) else None for n in given}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f"{path} holds no losses by domain", "it is not of the form {model_params: [...], losses: {domain: [...]}}", "write it so"
        ) from None
    if not losses:
        raise UserError(f"{path} names no domain", how="give losses: {domain: [...]}")
    if len(set(sizes)) < 3 or min(sizes) <= 0:
        raise UserError(
            f"{path} has {len(set(sizes))} model sizes", "three unknowns need three different sizes above 0", "give more losses"
        )
    for domain, values in losses.items():
        if len(values) != len(sizes) or not np.isfinite(values).all():
            raise UserError(f"domain '{domain}' has {len(values)} losses", f"there are {len(sizes)} sizes", "give one finite loss per size")
    for n, row in known.items():
        if row is not None and len(row) != len(losses):
            raise UserError(f"target {n:.0f} has {len(row)} losses", f"there are {len(losses)} domains", "give one per domain, in order")
    wanted = {float(n): known.get(float(n)) for n in targets} if targets else known
    if not wanted or min(wanted) <= 0:
        raise UserError("there is no size to predict at", how="give targets, as in --targets 1.3e9")
    return sizes, losses, wanted


def _finding(
    sizes: list[float],
    losses: dict[str, list[float]],
    laws: dict[str, Law],
    predicted: dict[str, dict[str, float]],
    metrics: dict[str, Any],
) -> EvalResult:
    rows = [
        [d, f"{w.a:.4g}", f"{w.b:.4f}", f"{w.c:.4f}", f"{w.error:.1e}", *(f"{p[d]:.4f}" for p in predicted.values())]
        for d, w in laws.items()
    ]
    columns = ["domain", "a", "b", "c", "error", *(f"at {float(n):.4g}" for n in predicted)]
    series = {
        d: sorted(
            [[math.log10(n), v] for n, v in zip(sizes, losses[d], strict=True)]
            + [[math.log10(float(n)), p[d]] for n, p in predicted.items()]
        )
        for d in laws
    }
    plot = {
        "kind": "line",
        "title": "Measured and predicted losses",
        "x": "log10 parameters",
        "y": "loss, nats per token",
        "series": series,
    }
    said = [f"{len(laws)} laws, {len(predicted) * len(laws)} predicted losses."]
    if "compared" in metrics:
        said.append(f"{metrics['equal_to_four_digits']} of {metrics['compared']} known losses are met to four digits.")
    if len(set(sizes)) == 3:
        said.append("Three sizes and three unknowns: the curve passes through every point, so nothing tests it.")
    if negative := [d for d, w in laws.items() if w.c < 0]:
        said.append(f"The limit c is below 0 for {', '.join(negative)}, which no loss can reach.")
    return EvalResult(metrics, " ".join(said), tables=[{"title": "a / N^b + c", "columns": columns, "rows": rows}], plots=[plot])


METHOD = scaling_law
