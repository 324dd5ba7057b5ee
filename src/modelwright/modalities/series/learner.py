"""A regressor of scikit-learn by name, seeded."""

from collections.abc import Callable
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.numbers import learners

DEFAULT = "HistGradientBoostingRegressor"
SMALL_TREES = {"max_iter": 300, "learning_rate": 0.05, "max_leaf_nodes": 7}
PLACES = ("ensemble", "linear_model", "svm", "neighbors", "neural_network", "tree", "kernel_ridge", "gaussian_process", "dummy")


def regressor(name: str, settings: dict[str, Any]) -> Callable[[], Any]:
    """A maker of fresh, seeded regressors: the name of one in scikit-learn, or module:Class."""
    kind = learners.found(name, PLACES, "the daily shape")
    if ":" not in name and not (hasattr(kind, "predict") and hasattr(kind, "fit")):
        raise UserError(f"scikit-learn has no regressor '{name}'", how=f"write one of its names, such as {DEFAULT} or Ridge")
    return learners.fresh(kind, name, (SMALL_TREES if name == DEFAULT else {}) | settings)
