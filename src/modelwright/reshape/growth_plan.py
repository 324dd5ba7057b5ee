"""When to grow: the tokens that the small model should see, by G_stack's law, and what the growth saves (arXiv 2405.15319).

Fitted in the paper on models of 0.4B, 1.1B and 3B parameters at equal compute:

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74

N: parameters of the grown model. C = 6 N D: the FLOPs of training it on D tokens without growing (the official code does not say
what C is; with this one all four published figures come out). d: tokens before growing. The growth factor is 4 at every size in the
paper (2 to 4 is best there). d falls as C grows.

The small model has about N / factor parameters (embeddings are not counted apart), so its d tokens cost 6 (N / factor) d FLOPs. Both
halves are counted here: what is left of C trains the grown model. `speed_up` is FLOPs from scratch over FLOPs of the grown run, minus
1, at equal loss; the paper's 54.6 % is 300B / 194B tokens - 1 and leaves the small half out. Both are given.

Beyond the law's range (0.4B to 70B parameters, 1e20 to 1e25 FLOPs) the plan warns. For tiny models the law asks for more tokens than
there are; then the plan refuses and names 5 to 10 % of D, which is ours.
"""

import math
from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext

PARAMS, FLOPS = (0.4e9, 70e9), (1e20, 1e25)  # where the law was fitted, or used by its authors


@dataclass(frozen=True)
class Knobs:
    params: float = knob(help="parameters of the grown model, as in 7e9 or 7B", low=1)
    tokens: float = knob(help="training tokens without growing, as in 2e12", low=1)
    factor: int = knob(4, "times as many blocks after growing", low=2)
    scratch_tokens: float | None = knob(None, "measured: tokens from scratch to a loss", low=1)
    grown_tokens: float | None = knob(None, "measured: tokens of the grown model to the same loss", low=1)


def growth_tokens(params: float, flops: float) -> float:
    """d of the law."""
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(flops) - 5.74)


def speed_up(params: float, scratch: float, grown: float, small: float = 0.0, factor: int = 1) -> float:
    """FLOPs from scratch over FLOPs of the grown run, minus 1; `small` tokens of a model of params / factor are counted in."""
    return scratch * params / (grown * params + small * params / factor) - 1


def growth_plan(knobs: Knobs, job: StepContext) -> EvalResult:
    """Tokens before growing, both halves in FLOPs, and the speed-up where two measured runs are given."""
    flops = 6 * knobs.params * knobs.tokens
    if flops <= 10:
        raise UserError(f"params={knobs.params:g} and tokens={knobs.tokens:g} are no training run", "the law needs more than 10 FLOPs")
    if (knobs.scratch_tokens is None) != (knobs.grown_tokens is None):
        raise UserError("only one of scratch_tokens and grown_tokens is given", "a speed-up compares two runs", "give both, or none")
    d = growth_tokens(knobs.params, flops)
    if d >= knobs.tokens:
        fitted = f"runs of {FLOPS[0]:g} FLOPs and more, and this one has {flops:.3g}"
        if flops >= FLOPS[0]:
            fitted = f"models of {PARAMS[0]:g} parameters and more, and this one has {knobs.params:.3g}"
        raise UserError(
            f"the law asks for {d:.3g} tokens before growing and there are {knobs.tokens:.3g}",
            f"it was fitted on {fitted}",
            f"take 5 to 10 % of the tokens instead: {0.05 * knobs.tokens:.3g} to {0.1 * knobs.tokens:.3g}",
        )
    small = 6 * knobs.params / knobs.factor * d
    metrics: dict[str, Any] = {
        "growth_tokens": d,
        "growth_tokens_billions": round(d / 1e9, 2),
        "factor": knobs.factor,
        "flops": flops,
        "flops_small": small,
        "flops_grown": flops - small,
        "grown_tokens_at_equal_flops": (flops - small) / (6 * knobs.params),
        "warnings": _warnings(knobs.params, flops),
    }
    if knobs.scratch_tokens and knobs.grown_tokens:
        metrics["speed_up"] = speed_up(knobs.params, knobs.scratch_tokens, knobs.grown_tokens)
        metrics["speed_up_small_model_counted"] = speed_up(knobs.params, knobs.scratch_tokens, knobs.grown_tokens, d, knobs.factor)
    return _finding(knobs, metrics)


def _warnings(params: float, flops: float) -> list[str]:
    found = []
    for name, value, (low, high) in (("parameters", params, PARAMS), ("FLOPs", flops, FLOPS)):
        if not low <= value <= high:
            found.append(f"{value:.3g} {name} lie outside {low:g} to {high:g}: the law extrapolates")
    return found


def _finding(knobs: Knobs, m: dict[str, Any]) -> EvalResult:
    rows = [
        ["small model", f"{knobs.params / knobs.factor:.3g}", f"{m['growth_tokens']:.4g}", f"{m['flops_small']:.3g}"],
        ["grown model", f"{knobs.params:.3g}", f"{m['grown_tokens_at_equal_flops']:.4g}", f"{m['flops_grown']:.3g}"],
        ["without growing", f"{knobs.params:.3g}", f"{knobs.tokens:.4g}", f"{m['flops']:.3g}"],
    ]
    tables = [{"title": "Two halves at equal FLOPs", "columns": ["", "parameters", "tokens", "FLOPs"], "rows": rows}]
    tiles = [(f"{m['growth_tokens'] / 1e9:.2f}B", "tokens before growing", f"by {knobs.factor} times")]
    if "speed_up" in m:
        tiles.append((f"{m['speed_up']:.1%}", "speed-up", f"{m['speed_up_small_model_counted']:.1%} with the small model counted"))
    when = f"{m['growth_tokens'] / 1e9:.2f}B tokens, then grow it {knobs.factor} times"
    text = f"Train a model of {knobs.params / knobs.factor:.3g} parameters for {when}."
    return EvalResult(m, " ".join([text, *(w[0].upper() + w[1:] + "." for w in m["warnings"])]), tiles, tables)


METHOD = growth_plan
