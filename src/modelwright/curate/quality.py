"""Quality: some thirty features of each document, a classifier that learns from labelled examples, and a cut that is chosen by a table.

When to use it: as the last stage for text from the web, with a few hundred documents that somebody has called good or bad, or with a
classifier of transformers that exists already. Without either it writes the features as columns and removes nothing.

Paper: WanJuan-CC (arXiv 2402.19282), the fifth stage of its funnel, which removed 50.1 % of its documents with BERT classifiers for
advertisements and fluency. There is no official code. The features are those of llm-web-kit, by the same laboratory, whose later
version is a gradient-boosted tree over such features with the thresholds .59 for articles and .70 for books and papers.

- features (kernels/features.py): computed for a batch from one tokenisation; 0 / 0 is 0, so that no learner is fed what is no number.
- `learner`: any classifier of scikit-learn by its name, or module:Class, such as lightgbm:LGBMClassifier. It learns from `labelled`, a
  table of texts and labels, and gives `quality_score`, the probability of a good document.
- `classifiers`: any sequence classifier of transformers, as `name: {model, label, limit}`; `label` is the good one. Its score stands in
  `name_score`. A long document is seen as its head and its last `tail` tokens.

A document is removed where a score is below its limit. The table `thresholds` says what each threshold would remove; with labelled
texts it also has the shares of good texts kept and of bad texts removed, each text scored by a learner that did not see it.
Examples on both sides of the limit are shown. The trained learner is not saved: it is made again from the table, with the same seed.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, did_you_mean, short
from modelwright.core.knobs import Data, knob
from modelwright.core.numbers import learners
from modelwright.core.step import EvalResult
from modelwright.curate.kernels.documents import PLACE, Sink, Source
from modelwright.curate.kernels.features import features
from modelwright.curate.safety import Classifier

_PLACES = ("ensemble", "linear_model", "naive_bayes", "neighbors", "neural_network", "tree", "svm", "gaussian_process", "dummy")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.59, 0.7, 0.8, 0.9)
GOOD = ("1", "true", "good", "high", "yes")
FOLDS = 5


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "documents: jsonl, jsonl.gz, parquet, csv, text, or a folder of them; every column is kept")
    labelled: str = knob("", "documents with labels to learn from: the same kinds of file, the same column of text", path=True)
    label: str = knob("label", "column of the labels: two values, one of them 1, true, good, high or yes")
    learner: str = knob("HistGradientBoostingClassifier", "classifier of scikit-learn by name, or module:Class")
    settings: dict[str, Any] = knob({}, "settings of the learner")
    limit: float = knob(0.59, "quality_score below which a document is removed", low=0, high=1)
    classifiers: dict[str, Any] = knob({}, "name: {model: PATH, label: NAME OF THE GOOD ONE, limit: 0.5}")
    tail: int = knob(128, "tokens at the end of a long document that a classifier sees", low=0, high=510)
    drop: bool = knob(True, "leave documents out; false: only write the columns")
    columns: bool = knob(True, "write every feature as a column quality_NAME")
    examples: int = knob(3, "documents shown on each side of the limit", low=0)


@dataclass
class Scores:
    """All scores of one kind, and the documents nearest to the limit on both sides."""

    limit: float
    most: int
    values: list[float] = field(default_factory=list)
    below: list[tuple[float, str]] = field(default_factory=list)
    above: list[tuple[float, str]] = field(default_factory=list)

    def add(self, value: float, text: str) -> bool:
        """Whether the document falls below the limit."""
        self.values.append(value)
        low = value < self.limit
        near = self.below if low else self.above
        near.append((value, " ".join(text[:160].split())))
        near.sort(key=lambda x: abs(x[0] - self.limit))
        del near[self.most :]
        return low

    def table(self) -> list[dict[str, float]]:
        """What each threshold would remove."""
        v = np.array(self.values)
        return [{"threshold": t, "removed": round(float((v < t).mean()), 6)} for t in sorted({*THRESHOLDS, self.limit})]

    def shown(self) -> dict[str, list[str]]:
        return {side: [f"{v:.3f} {t}" for v, t in near] for side, near in (("below", self.below), ("above", self.above))}


def matrix(found: dict[str, np.ndarray]) -> np.ndarray:
    """Features as (docs, features)."""
    return np.stack(list(found.values()), 1)


def read_labelled(knobs: Knobs) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the labelled texts. Raises UserError unless there are two labels, one of which is known as good."""
    source = Source(Data(knobs.labelled, knobs.data.column))
    parts, labels = [], list[str]()
    for batch in source:
        if knobs.label not in batch.schema.names:
            raise UserError(f"{knobs.labelled} has no column '{knobs.label}'", how=did_you_mean(knobs.label, batch.schema.names))
        parts.append(matrix(features(batch.column(source.column).to_pylist())))
        labels += [str(v).strip().lower().removesuffix(".0") for v in batch.column(knobs.label).to_pylist()]
    kinds = sorted(set(labels))
    good = [k for k in kinds if k in GOOD]
    if len(kinds) != 2 or len(good) != 1:
        shown = ", ".join(kinds[:4]) + (" ..." if len(kinds) > 4 else "")
        raise UserError(f"the labels of {knobs.labelled} are {shown}", f"two are needed, one of them {', '.join(GOOD)}", "rename them")
    y = np.array([v == good[0] for v in labels])
    if min(y.sum(), (~y).sum()) < FOLDS:
        raise UserError(f"{knobs.labelled} has fewer than {FOLDS} texts of a label", "the learner is checked on held-out texts", "add some")
    return np.concatenate(parts), y


def _classifier(name: str, settings: dict[str, Any], seed: int) -> Callable[[], Any]:
    """A maker of fresh classifiers with probabilities: the name of one in scikit-learn, or module:Class."""
    kind = learners.found(name, _PLACES, "quality")
    if not hasattr(kind, "predict_proba") or not hasattr(kind, "fit"):
        raise UserError(f"'{name}' is no classifier with probabilities", how="write a name such as HistGradientBoostingClassifier")
    return learners.fresh(kind, name, settings, seed)


def learn(knobs: Knobs, seed: int) -> tuple[Any, dict[str, Any]]:
    """The learner, fitted, and what it is worth: its scores of texts that it did not see."""
    make = _classifier(knobs.learner, knobs.settings, seed)
    x, y = read_labelled(knobs)
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    held = np.zeros(len(y))
    try:
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y):
            held[test] = make().fit(x[train], y[train]).predict_proba(x[test])[:, 1]
        model = make().fit(x, y)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{knobs.learner} cannot be fitted", short(error), "look at its settings") from None
    rows = {
        t: {"good kept": round(float((held[y] >= t).mean()), 6), "bad removed": round(float((held[~y] < t).mean()), 6)}
        for t in sorted({*THRESHOLDS, knobs.limit})
    }
    return model, {"labelled": len(y), "good": int(y.sum()), "held-out AUC": round(float(roc_auc_score(y, held)), 6), "rows": rows}


def quality(knobs: Knobs, folder: Path, seed: int = 0) -> EvalResult:
    """Write dataset.jsonl with the scores and features, and removed.jsonl: row, reason, flags."""
    source = Source(knobs.data)
    plugs = {name: Classifier(name, settings, knobs.tail) for name, settings in knobs.classifiers.items()}
    model, learnt = learn(knobs, seed) if knobs.labelled else (None, {})
    scores = {name: Scores(plug.limit, knobs.examples) for name, plug in plugs.items()}
    if model is not None:
        scores = {"quality": Scores(knobs.limit, knobs.examples)} | scores
    reasons: Counter[str] = Counter()
    with Sink(folder / "dataset.jsonl") as sink, open(folder / "removed.jsonl", "w", encoding="utf-8") as out:
        for batch in source:
            rows = batch.to_pylist()
            texts = [row[source.column] for row in rows]
            found = features(texts)
            given = {"quality": model.predict_proba(matrix(found))[:, 1]} if model is not None else {}
            given |= {name: np.array([plug(t) for t in texts]) for name, plug in plugs.items()}
            for i, row in enumerate(rows):
                if knobs.columns:
                    row |= {f"quality_{k}": round(float(v[i]), 6) for k, v in found.items()}
                row |= {f"{name}_score": round(float(v[i]), 6) for name, v in given.items()}
                flags = [name for name, s in scores.items() if s.add(row[f"{name}_score"], texts[i])]
                reasons.update(flags[:1])
                if flags:
                    out.write(json.dumps({"row": row[PLACE], "reason": flags[0], "flags": flags}) + "\n")
                if not flags or not knobs.drop:
                    sink.write([row], source.column)
    thresholds = {name: s.table() for name, s in scores.items()}
    if learnt:
        checked = learnt.pop("rows")
        thresholds["quality"] = [row | checked[row["threshold"]] for row in thresholds["quality"]]
    metrics = {
        "documents": source.rows,
        "kept": sink.rows,
        "removed": source.rows - sink.rows,
        "first reasons": dict(reasons.most_common()),
        **learnt,
        "thresholds": thresholds,
        "examples": {name: s.shown() for name, s in scores.items()},
        **{f"dropped: {k}": v for k, v in source.dropped.items()},
    }
    return _result(metrics)


def _result(metrics: dict[str, Any]) -> EvalResult:
    """The result of the step: counts for scripts, a table of thresholds and one of examples for people."""
    tables = []
    for name, rows in metrics["thresholds"].items():
        tables.append({"title": f"What a threshold of {name} removes", "columns": list(rows[0]), "rows": [list(r.values()) for r in rows]})
        shown = [[side, *text.split(" ", 1)] for side, of in metrics["examples"][name].items() for text in of]
        tables.append({"title": f"Nearest to the limit of {name}", "columns": ["side", "score", "text"], "rows": shown})
    checked = f" Held-out AUC {metrics['held-out AUC']:.3f}." if "held-out AUC" in metrics else ""
    return EvalResult(metrics, text=f"{metrics['kept']:,} of {metrics['documents']:,} documents are kept.{checked}", tables=tables)


METHOD = quality
