"""The four uses of TapTap, each with its controls: what the backbone scores on held-out rows after learning from what."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.step import EvalResult, StepContext
from modelwright.modalities.tabular import gaps, quality
from modelwright.modalities.tabular.backbone import Backbone
from modelwright.modalities.tabular.columns import Columns, Field, take
from modelwright.modalities.tabular.model import TapTap


@dataclass
class Work:
    """A table split in two, the model and the backbone."""

    knobs: Any
    job: StepContext
    model: TapTap
    backbone: Backbone
    learnt: Columns
    test: Columns
    target: str
    rng: np.random.Generator
    more: list[Columns]

    def fit(self, columns: Columns) -> None:
        with self.job.progress.task("learn the table", 1) as tick:
            self.model.fit(columns, self.job.folder, self.more, tick.to)

    def score(self, columns: Columns, on: Columns | None = None) -> dict[str, float]:
        """What a fresh backbone scores that learnt from these rows."""
        return self.backbone.fit(columns).score(self.test if on is None else on)

    def sample(self, n: int) -> Columns:
        """Rows with the model's labels; columns that were left out are empty."""
        with self.job.progress.task("write rows", 1) as tick:
            found = self.model.sample(n, temperature=self.knobs.temperature, seed=self.job.seed)
            tick(1)
        return {c: found.get(c, [None] * n) for c in self.learnt}

    def valid(self, columns: Columns) -> dict[str, float]:
        """The share of rows whose every value the grammar can write, and what it would have been without the grammar."""
        right = [all(readable(f, columns[f.name][i]) for f in self.model.fields) for i in range(len(columns[self.target]))]
        return {"valid": float(np.mean(right)), "valid_without_grammar": self.model.valid}

    @property
    def measure(self) -> str:
        return "R2" if self.backbone.task == "regression" else "accuracy"


def readable(f: Field, value: Any) -> bool:
    """Whether a value is one that the field can hold."""
    try:
        return value is not None and f.read(f.spell(value)) == value
    except UserError:
        return False


def joined(a: Columns, b: Columns) -> Columns:
    """Rows of both."""
    return {n: [*v, *b[n]] for n, v in a.items()}


def _labelled(work: Work, n: int) -> tuple[dict[str, Columns], Columns]:
    """Rows by who wrote them and who labelled them."""
    own = work.sample(n)
    apart = quality.marginals(work.learnt, n, work.rng)
    work.backbone.fit(work.learnt)
    relabel = {k: work.backbone.relabel(v, work.learnt[work.target]) for k, v in (("own", own), ("apart", apart))}
    sets = {
        "rows of the model, its labels": own,
        "rows of the model, labels of the backbone": relabel["own"],
        "independent columns, their labels": apart,
        "independent columns, labels of the backbone": relabel["apart"],
    }
    return sets, own


def privacy(work: Work) -> tuple[EvalResult, Columns]:
    """Learn from synthetic rows alone; distances to the closest real row; how well the two are told apart."""
    work.fit(work.learnt)
    sets, own = _labelled(work, work.knobs.rows or len(work.learnt[work.target]))
    scores = {"real rows": work.score(work.learnt)} | {k: work.score(v) for k, v in sets.items()}
    on_synthetic = work.score(work.learnt, on=own)
    names = [f.name for f in work.model.fields]
    tables: Any = ({n: t[n] for n in names} for t in (own, work.learnt, work.test))
    private = quality.privacy(*tables)
    metrics: dict[str, Any] = {"scores": scores, "trts": on_synthetic} | work.valid(own) | private
    first, second = (scores[k]["score"] for k in ("real rows", "rows of the model, its labels"))
    apart = scores["independent columns, labels of the backbone"]["score"]
    words = (
        f"A backbone that learnt from synthetic rows alone reaches {work.measure} {second:.3f} with the model's labels and "
        f"{scores['rows of the model, labels of the backbone']['score']:.3f} with the backbone's; real rows {first:.3f}, and "
        f"independent columns with the backbone's labels {apart:.3f}. Synthetic rows lie {private['dcr']:.2f} from the closest real "
        f"row (median), held-out ones {private['dcr_held_out']:.2f}."
    )
    tiles = [
        (f"{second:.3f}", f"{work.measure} from synthetic rows", f"real rows {first:.3f}"),
        (f"{100 * metrics['valid']:.0f} %", "valid rows", f"{100 * work.model.valid:.1f} % without the grammar"),
        (f"{100 * private['copies']:.1f} %", "copies of real rows", f"held-out rows {100 * private['copies_held_out']:.1f} %"),
    ]
    table = _table(scores, f"{work.measure} on held-out real rows, by what the backbone learnt from")
    told = {"title": "What synthetic rows give away", "columns": ["measure", "synthetic", "held-out real rows"], "rows": [
        ["median distance to the closest row learnt from", f"{private['dcr']:.3f}", f"{private['dcr_held_out']:.3f}"],
        ["copies of rows learnt from", f"{100 * private['copies']:.2f} %", f"{100 * private['copies_held_out']:.2f} %"],
        ["told apart from real rows (AUC, .5 is not at all)", f"{private['detection_auc']:.3f}", ".5 by definition"],
    ]}  # fmt: skip
    return EvalResult(metrics, words, tiles, [table, told], [_bars(scores, work.measure)]), own


def low_resource(work: Work) -> tuple[EvalResult, Columns]:
    """Real rows and synthetic ones together."""
    work.fit(work.learnt)
    sets, own = _labelled(work, work.knobs.rows or len(work.learnt[work.target]))
    scores = {"real rows": work.score(work.learnt)} | {f"real rows and {k}": work.score(joined(work.learnt, v)) for k, v in sets.items()}
    found = {k.removeprefix("real rows and "): v["score"] for k, v in scores.items()}
    words = (
        f"{work.measure} on held-out rows: {found['real rows']:.3f} from {len(work.learnt[work.target])} real rows, "
        f"{found['rows of the model, labels of the backbone']:.3f} with synthetic rows added, "
        f"{found['independent columns, labels of the backbone']:.3f} with independent columns added."
    )
    metrics = {"scores": scores} | work.valid(own)
    return EvalResult(metrics, words, tables=[_table(scores, words)], plots=[_bars(scores, work.measure)]), own


def missing(work: Work) -> tuple[EvalResult, Columns]:
    """Hide values, fill them, and compare with the truth, with the usual ways, and by what a backbone then learns."""
    k, names = work.knobs, [n for n in work.learnt if n not in (work.target, *(work.model.known_left or {}))]
    hidden = gaps.holes(work.learnt, names, k.share, k.mechanism, work.rng)
    holed = gaps.with_holes(work.learnt, names, hidden)
    work.fit(holed)
    with work.job.progress.task("fill gaps", 1) as tick:
        filled = work.model.impute(holed, draws=k.draws, temperature=0.0 if k.draws == 1 else 1.0, seed=work.job.seed)
        tick(1)
    filled[work.target] = holed[work.target]  # a row without a target is none to learn from, whatever is written into it
    count = sum(v is None for n in names for v in holed[n])
    if not k.share:
        return EvalResult({"filled": count}, f"{count} gaps were filled; nothing was hidden, so nothing was measured."), filled
    ways = {"the model": filled} | {w: gaps.usual(holed, names, w) for w in ("mean", "knn", "mice")}
    found: dict[str, dict[str, float]] = {}
    for way, columns in ways.items():
        found[way] = gaps.error(work.learnt, columns, names, hidden) | work.score(columns)
    scores = {"nothing hidden": work.score(work.learnt), "gaps left as they are": work.score(holed)} | found
    first = "rmse" if "rmse" in found["mean"] else "accuracy"
    words = (
        f"{int(hidden.sum())} values were hidden ({k.mechanism}) and filled. {first}: "
        + ", ".join(f"{w} {v[first]:.3f}" for w, v in found.items())
        + "."
    )
    return EvalResult(
        {"scores": scores, "hidden": int(hidden.sum()), "filled": count}, words, tables=[_table(scores, "Filled gaps")]
    ), filled


def imbalance(work: Work) -> tuple[EvalResult, Columns]:
    """Cut the rarest class, write rows of it until the classes are even, and compare with copies of its rows."""
    if work.backbone.task == "regression":
        raise UserError(f"'{work.target}' has no classes", "imbalance is between classes", "choose a target with classes, or another use")
    count = Counter(v for v in work.learnt[work.target] if v is not None)
    if len(count) < 2:
        raise UserError(f"'{work.target}' has one value", "there is nothing to tell apart", "choose another target")
    rare = min(count, key=count.__getitem__)
    others = [i for i, v in enumerate(work.learnt[work.target]) if v != rare]
    few = [i for i, v in enumerate(work.learnt[work.target]) if v == rare]
    keep = max(2, min(len(few), round(work.knobs.minority * len(others) / (1 - work.knobs.minority))))
    cut = take(work.learnt, [*others, *few[:keep]])
    work.fit(cut)
    n = work.knobs.rows or max(1, max(count[c] for c in count if c != rare) - keep)
    with work.job.progress.task("write rows", 1) as tick:
        made = work.model.balance(work.target, n, work.job.seed)
        tick(1)
    own = {c: made.get(c, [None] * n) for c in work.learnt}
    copied = take(work.learnt, work.rng.choice(few[:keep], n))
    scores = {
        f"rarest class cut to {keep} rows": work.score(cut),
        "and rows of the model": work.score(joined(cut, own)),
        "and copies of its rows": work.score(joined(cut, copied)),
        "nothing cut": work.score(work.learnt),
    }
    found = [v["f1"] for v in scores.values()]
    rarest = float(np.mean([v == rare for v in own[work.target]]))
    words = (
        f"Mean F1 over classes: {found[0]:.3f} with {keep} rows of {rare!r}, {found[1]:.3f} with {n} written, {found[2]:.3f} with copies."
    )
    metrics = {"scores": scores, "rare_share": rarest} | work.valid(own)
    return EvalResult(metrics, words, tables=[_table(scores, "Held-out rows")], plots=[_bars(scores, "mean F1", "f1")]), own


def _table(scores: dict[str, dict[str, float]], title: str) -> dict[str, Any]:
    names = list(dict.fromkeys(k for v in scores.values() for k in v))
    rows = [[k, *(f"{v[n]:.3f}" if n in v else "" for n in names)] for k, v in scores.items()]
    return {"title": title, "columns": ["", *names], "rows": rows}


def _bars(scores: dict[str, dict[str, float]], y: str, key: str = "score") -> dict[str, Any]:
    return {"kind": "bars", "title": "", "y": y, "groups": list(scores), "series": {y: [v[key] for v in scores.values()]}}


USES: dict[str, Callable[[Work], tuple[EvalResult, Columns]]] = {
    "privacy": privacy,
    "low_resource": low_resource,
    "missing": missing,
    "imbalance": imbalance,
}
