"""What synthetic rows give away and how they differ from real ones: distances to the closest record, copies, a detector."""

from typing import Any

import numpy as np

from modelwright.modalities.tabular.backbone import Features
from modelwright.modalities.tabular.columns import Columns, rows_of, take


def closest(rows: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Distance of each row to its closest record (DCR), Manhattan over the features; (n,)."""
    return np.array([np.abs(to - r).sum(1).min() for r in rows])


def copies(rows: Columns, of: Columns) -> float:
    """The share of rows that stand in `of` as they are."""
    known = {tuple(map(repr, r.values())) for r in rows_of(of)}
    found = [tuple(map(repr, r.values())) in known for r in rows_of({n: rows[n] for n in of})]
    return float(np.mean(found)) if found else 0.0


def marginals(columns: Columns, n: int, rng: np.random.Generator) -> Columns:
    """The control that knows nothing of rows: each column drawn by itself."""
    return {name: [values[i] for i in rng.integers(0, len(values), n)] for name, values in columns.items()}


def detection(real: np.ndarray, synthetic: np.ndarray) -> float:
    """How well a fresh gradient boosting tells the two apart: area under the curve over three folds; .5 is not at all."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    x = np.concatenate([real, synthetic])
    y = np.r_[np.zeros(len(real)), np.ones(len(synthetic))]
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    model = HistGradientBoostingClassifier(max_iter=50, random_state=0)
    return float(roc_auc_score(y, cross_val_predict(model, x, y, cv=folds, method="predict_proba")[:, 1]))


def privacy(synthetic: Columns, learnt: Columns, held_out: Columns, most: int = 1000) -> dict[str, Any]:
    """Median distance of synthetic rows to the rows that were learnt, beside that of real rows that were not; copies of both."""
    features = Features(learnt, list(learnt))
    a, b, c = (features(take(t, range(min(most, len(next(iter(t.values()))))))) for t in (synthetic, held_out, learnt))
    return {
        "dcr": float(np.median(closest(a, c))),
        "dcr_held_out": float(np.median(closest(b, c))),
        "copies": copies(synthetic, learnt),
        "copies_held_out": copies(held_out, learnt),
        "detection_auc": detection(c[: len(a)], a[: len(c)]),
    }
