"""One answer out of many: ways to choose among the reasoning chains that were sampled for a question.

- self_consistency (2203.11171): the most frequent answer among the first n chains; empty answers do not vote, the first seen
  wins a tie.
- complexity (2210.00720): the same vote among the `top` chains with the most steps, a step being a line that is not empty.
- esc (2401.10480): sample windows of `window` chains and stop at the first whose answers are all the same, else at n; then vote.
- adaptive (2305.11860): after each chain, stop when the leading answer is the majority with probability `confidence` by
  Beta(v1 + 1, v2 + 1) over the two leading counts, v1 and v2; then vote.
- best_of_n (2110.14168): the answer of the chain with the highest score, from a reward model or a verifier.
- aor (2405.12939): judge/aor.py, for which `select` needs a scorer.

Defaults are the papers' where they name one (window 5, confidence 0.95, up to 40 chains). The paper on complexity votes among
the more complex part of its chains; `top` is half of them unless it is given. `judge.select` runs them on recorded chains and
draws accuracy against chains; the first n are taken, in the order of the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.judge import aor
from modelwright.judge.chains import votes
from modelwright.judge.chains.answers import Choice, Kind
from modelwright.judge.chains.questions import COLUMNS, Question, coverage, measure, read_chains, table_row
from modelwright.judge.chains.scoring import Scorer

METHODS = ("self_consistency", "complexity", "esc", "adaptive", "best_of_n", "aor")


@dataclass(frozen=True)
class Knobs:
    chains: str = knob(help="recorded chains: a table with one row per question", path=True, argument=True)
    kind: Literal["number", "choice", "yes_no", "letters", "text"] = knob("number", "what the final answer is")
    methods: list[str] = knob(["self_consistency", "complexity", "esc", "adaptive"], "ways to choose; also: best_of_n")
    n: int = knob(40, "chains per question, at most", low=1)
    top: int = knob(0, "complexity: chains that vote; 0: half of n", low=0)
    window: int = knob(5, "esc: chains per window", low=1)
    confidence: float = knob(0.95, "adaptive: probability at which sampling stops", low=0.5, high=1)
    columns: dict[str, str] = knob({}, "names of the columns question, answer, chains, scores; by default these, or the only list of texts")
    limit: int | None = knob(None, "use at most this many questions", low=1)


def select(
    chains: Sequence[str],
    method: str = "self_consistency",
    *,
    kind: Kind = "number",
    n: int = 40,
    top: int = 0,
    window: int = 5,
    confidence: float = 0.95,
    scores: Sequence[float] | None = None,
    question: str = "",
    scorer: Scorer | None = None,
    settings: aor.Knobs | None = None,
    seed: int = 0,
) -> Choice:
    """Choose an answer. Chains beyond the ones that a method wants are not looked at, so `chains` may sample them as it is
    indexed. Raises UserError for an unknown method, and for a missing score or scorer."""
    if method == "self_consistency":
        return votes.self_consistency(chains, kind, n)
    if method == "complexity":
        return votes.complexity(chains, kind, n, top)
    if method == "esc":
        return votes.early_stopping(chains, kind, n, window)
    if method == "adaptive":
        return votes.adaptive(chains, kind, n, confidence)
    if method == "best_of_n":
        return votes.best_of_n(chains, kind, n, scores)
    if method != "aor":
        raise UserError(f"unknown method '{method}'", how=did_you_mean(method, METHODS))
    if scorer is None:
        raise UserError("aor needs a scorer", "it asks a judge", "give scorer=...")
    asked = replace(settings or aor.Knobs(chains=""), kind=kind)
    return aor.run([Question(question, "", chains)], scorer, asked, seed)[0]


def select_step(knobs: Knobs, job: StepContext) -> EvalResult:
    """Every method on recorded chains: accuracy with its interval, chains per question, and accuracy against the budget."""
    for m in knobs.methods:
        if m not in METHODS:
            raise UserError(f"unknown method '{m}'", how=did_you_mean(m, METHODS))
        if m == "aor":
            raise UserError("aor asks a judge", how="run judge.aor")
    asked = read_chains(Path(knobs.chains), knobs.kind, knobs.columns, knobs.limit, scores="best_of_n" in knobs.methods)
    found: dict[str, Any] = {"questions": len(asked), "methods": {}}
    with job.progress.task("choose", len(knobs.methods)) as tick:
        for m in knobs.methods:
            found["methods"][m] = measure(asked, [_choose(q, m, knobs) for q in asked], knobs.kind)
            tick(1)
    most = min(knobs.n, max(len(q.chains) for q in asked))
    found["coverage"] = coverage(asked, knobs.kind, most)
    found["curves"] = curves = {m: _curve(asked, m, knobs, most) for m in knobs.methods}
    rows = [table_row(m, r) for m, r in found["methods"].items()]
    best = max(found["methods"], key=lambda m: found["methods"][m]["accuracy"])
    return EvalResult(
        found,
        text=f"{len(asked)} questions; the right answer is among the first {most} chains of {found['coverage']:.1f} %.",
        tiles=[(f"{found['methods'][best]['accuracy']:.1f} %", best, f"{found['methods'][best]['chains']:.2f} chains a question")],
        tables=[{"title": "Accuracy in percent, per question chains and judge calls", "columns": COLUMNS, "rows": rows}],
        plots=[{"kind": "line", "title": "Accuracy against the budget", "x": "chains per question", "y": "percent", "series": curves}],
    )


def _choose(q: Question, method: str, k: Knobs) -> Choice:
    return select(
        q.chains, method, kind=k.kind, n=k.n, top=k.top, window=k.window, confidence=k.confidence, scores=q.scores, question=q.text
    )


def _curve(asked: list[Question], method: str, knobs: Knobs, most: int) -> list[list[float]]:
    """[chains, accuracy] as the method's own setting goes up: its n, its window, its confidence."""
    settings: list[dict[str, Any]] = [{"n": n} for n in (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60, 80) if n < most] + [{"n": most}]
    if method == "esc":
        settings = [{"window": w} for w in (2, 3, 4, 5, 6, 8, 10) if w <= most]
    if method == "adaptive":
        settings = [{"confidence": c} for c in (0.7, 0.8, 0.9, 0.95, 0.99, 0.999)]
    points = [measure(asked, [_choose(q, method, replace(knobs, **s)) for q in asked], knobs.kind) for s in settings]
    return sorted([p["chains"], p["accuracy"]] for p in points)


METHOD = select_step
