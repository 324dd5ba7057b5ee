"""The predictor that a person trusts: any pair of classifier and regressor of scikit-learn, and the numbers it is judged by."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, short
from modelwright.core.numbers import learners
from modelwright.modalities.tabular.columns import Columns

DEFAULT = "HistGradientBoosting"
PLACES = ("ensemble", "neural_network", "linear_model", "svm", "neighbors", "tree", "dummy")
PLUGINS = {"LGBM": "lightgbm", "XGB": "xgboost"}


def maker(name: str, task: str, settings: dict[str, Any]) -> Callable[[], Any]:
    """Makes fresh, seeded predictors: the stem of a pair of scikit-learn's (RandomForest, MLP), LGBM, or module:Stem."""
    ending = "Classifier" if task == "classification" else "Regressor"
    module, _, stem = name.rpartition(":")
    module = module or PLUGINS.get(stem, "")
    kind = None
    try:
        places = [module] if module else [f"sklearn.{p}" for p in (PLACES[:1] if stem == DEFAULT else PLACES)]
        kind = next((found for p in places if (found := getattr(import_module(p), stem + ending, None)) is not None), None)
    except ImportError as error:
        package = module.split(".")[0] or "scikit-learn"
        how = "pip install 'modelwright[series]'" if package == "scikit-learn" else f"pip install {package}"
        raise UserError(f"backbone={name} cannot be imported", short(error), how) from None
    if kind is None:
        raise UserError(
            f"backbone={name} is unknown", f"no {stem}{ending} was found", f"write {DEFAULT}, RandomForest, MLP, LGBM or module:Stem"
        )
    return learners.fresh(kind, stem + ending, settings)


def task_of(values: list[Any]) -> str:
    """Classification for words and for at most ten whole numbers, else regression."""
    present = {v for v in values if v is not None}
    numeric = all(type(v) in (int, float) for v in present)
    return "regression" if numeric and not (len(present) <= 10 and all(float(v).is_integer() for v in present)) else "classification"


class Features:
    """Columns as an array: numbers standardised, gaps at the mean; a column per category (the fifty commonest)."""

    def __init__(self, columns: Columns, names: list[str]):
        self.names = names
        self.plan: dict[str, Any] = {}
        for n in names:
            present = [v for v in columns[n] if v is not None]
            if present and all(type(v) in (int, float) for v in present):
                x = np.array(present, float)
                self.plan[n] = (float(x.mean()), float(x.std()) or 1.0)
            else:
                kinds, count = np.unique([str(v) for v in present] or ["none"], return_counts=True)
                self.plan[n] = list(kinds[np.argsort(-count, kind="stable")][:50])

    def __call__(self, columns: Columns) -> np.ndarray:
        parts = []
        for n in self.names:
            plan = self.plan[n]
            if isinstance(plan, tuple):
                x = np.array([plan[0] if v is None else float(v) for v in columns[n]])
                parts.append((x - plan[0])[:, None] / plan[1])
            else:
                words = np.array([str(v) for v in columns[n]])
                parts.append((words[:, None] == np.array(plan)[None]).astype(float))
        return np.concatenate(parts, 1)


class Backbone:
    """A predictor of one column from the others."""

    def __init__(self, make: Callable[[], Any], task: str, target: str, features: Features):
        self.make, self.task, self.target, self.features = make, task, target, features

    def labels(self, columns: Columns) -> np.ndarray:
        values = columns[self.target]
        return np.array([float(v) for v in values]) if self.task == "regression" else np.array([str(v) for v in values])

    def fit(self, columns: Columns) -> "Backbone":
        """Learn from the rows that have a target."""
        keep = [i for i, v in enumerate(columns[self.target]) if v is not None]
        part = {n: [v[i] for i in keep] for n, v in columns.items()}
        y = self.labels(part)
        self.only = y[0] if self.task == "classification" and len(set(y)) == 1 else None
        self.model = None if self.only is not None else self.make().fit(self.features(part), y)
        return self

    def predict(self, columns: Columns) -> np.ndarray:
        x = self.features(columns)
        return np.array([self.only] * len(x)) if self.model is None else self.model.predict(x)

    def relabel(self, columns: Columns, like: list[Any]) -> Columns:
        """The same rows with predicted targets, in the form of `like`."""
        known = {str(v): v for v in like if v is not None}
        found = [float(v) if self.task == "regression" else known[str(v)] for v in self.predict(columns)]
        return columns | {self.target: found}

    def score(self, columns: Columns) -> dict[str, float]:
        """R2, or accuracy and the mean F1 over classes, on rows that have a target."""
        from sklearn.metrics import accuracy_score, f1_score, r2_score

        keep = [i for i, v in enumerate(columns[self.target]) if v is not None]
        part = {n: [v[i] for i in keep] for n, v in columns.items()}
        truth, found = self.labels(part), self.predict(part)
        if self.task == "regression":
            return {"score": float(r2_score(truth, found))}
        return {"score": float(accuracy_score(truth, found)), "f1": float(f1_score(truth, found, average="macro", zero_division=0))}
