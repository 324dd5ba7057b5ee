"""Gaps that are made to be filled again (MCAR, MAR, MNAR), the usual ways to fill them, and how well it went."""

import warnings
from typing import Any

import numpy as np

from modelwright.core.errors import UserError
from modelwright.modalities.tabular.columns import Columns


def holes(columns: Columns, names: list[str], share: float, mechanism: str, rng: np.random.Generator) -> np.ndarray:
    """Which present values of these columns are hidden, (n, columns) bool; `share` of each column is.

    mcar: any value alike. mar: rows whose next column is high are likelier. mnar: high values themselves are likelier.
    """
    n = len(columns[names[0]])
    found = np.zeros((n, len(names)), bool)
    for k, name in enumerate(names):
        by = {"mcar": None, "mar": names[(k + 1) % len(names)], "mnar": name}[mechanism]
        weight = np.ones(n) if by is None else 0.2 + _ranks(columns[by])
        weight = weight * [v is not None for v in columns[name]]
        count = min(round(share * n), int((weight > 0).sum()))
        found[rng.choice(n, count, replace=False, p=weight / weight.sum()), k] = True
    empty = found.all(1)
    found[empty, rng.integers(0, len(names), int(empty.sum()))] = False  # a row keeps something to go by
    return found


def _ranks(values: list[Any]) -> np.ndarray:
    """Places of values in their order, from 0 to 1; gaps stand in the middle."""
    known = sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
    place = {v: i / max(1, len(known) - 1) for i, v in enumerate(known)}
    return np.array([place.get(v, 0.5) for v in values])


def with_holes(columns: Columns, names: list[str], hidden: np.ndarray) -> Columns:
    """The table with those values gone."""
    own = {n: [None if h else v for v, h in zip(columns[n], hidden[:, k], strict=True)] for k, n in enumerate(names)}
    return columns | own


def usual(columns: Columns, names: list[str], how: str) -> Columns:
    """Gaps filled by the mean or commonest value, by the five nearest rows, or by chained equations (MICE as scikit-learn has it)."""
    numeric = {n: all(type(v) in (int, float) for v in columns[n] if v is not None) for n in columns}
    codes = {n: sorted({str(v) for v in columns[n] if v is not None}) for n in columns if not numeric[n]}
    back = {n: {str(v): v for v in columns[n] if v is not None} for n in codes}
    x = np.array([[_coded(v, codes.get(n)) for v in columns[n]] for n in columns], float).T
    filled = _fill(x, how)
    out = dict(columns)
    for k, n in enumerate(columns):
        if n not in names:
            continue
        present = [v for v in columns[n] if v is not None]
        if numeric[n]:
            out[n] = [float(f) if v is None else v for v, f in zip(columns[n], filled[:, k], strict=True)]
        elif how == "mean":
            common = max(codes[n], key=[str(v) for v in present].count)
            out[n] = [back[n][common] if v is None else v for v in columns[n]]
        else:
            near = np.clip(np.rint(filled[:, k]), 0, len(codes[n]) - 1).astype(int)
            out[n] = [back[n][codes[n][j]] if v is None else v for v, j in zip(columns[n], near, strict=True)]
    return out


def _coded(value: Any, codes: list[str] | None) -> float:
    if value is None:
        return float("nan")
    return float(value) if codes is None else float(codes.index(str(value)))


def _fill(x: np.ndarray, how: str) -> np.ndarray:
    mean, spread = np.nanmean(x, 0), np.nanstd(x, 0)
    scaled = (x - mean) / np.where(spread > 0, spread, 1)
    if how == "mean":
        found = np.nan_to_num(scaled)
    elif how == "knn":
        from sklearn.impute import KNNImputer

        found = KNNImputer(n_neighbors=5).fit_transform(scaled)
    elif how == "mice":
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - scikit-learn asks for it
        from sklearn.impute import IterativeImputer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is a baseline of ten rounds
            found = IterativeImputer(max_iter=10, random_state=0).fit_transform(scaled)
    else:
        raise UserError(f"no way to fill gaps is called '{how}'", how="mean, knn and mice are known")
    return found * np.where(spread > 0, spread, 1) + mean


def error(truth: Columns, filled: Columns, names: list[str], hidden: np.ndarray) -> dict[str, float]:
    """Over the hidden values: root mean squared error of numbers in standard deviations, accuracy of categories."""
    squares: list[float] = []
    right: list[bool] = []
    for k, n in enumerate(names):
        present = [v for v in truth[n] if v is not None]
        numeric = all(type(v) in (int, float) for v in present)
        spread = float(np.std(present)) or 1.0 if numeric else 1.0
        for t, f, h in zip(truth[n], filled[n], hidden[:, k], strict=True):
            if h and numeric:
                squares.append(((t - f) / spread) ** 2)
            elif h:
                right.append(t == f)
    found = {"rmse": float(np.sqrt(np.mean(squares)))} if squares else {}
    return found | ({"accuracy": float(np.mean(right))} if right else {})
