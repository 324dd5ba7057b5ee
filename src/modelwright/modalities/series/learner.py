"""A regressor of scikit-learn by name, seeded; imported when a series is learnt, not before."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short

DEFAULT = "HistGradientBoostingRegressor"
SMALL_TREES = {"max_iter": 300, "learning_rate": 0.05, "max_leaf_nodes": 7}
PLACES = ("ensemble", "linear_model", "svm", "neighbors", "neural_network", "tree", "kernel_ridge", "gaussian_process", "dummy")


def regressor(name: str, settings: dict[str, Any]) -> Callable[[], Any]:
    """A maker of fresh, seeded regressors: the name of one in scikit-learn, or module:Class."""
    try:
        import_module("sklearn")
    except ImportError:
        raise UserError("scikit-learn is not installed", "the daily shape is learnt with it", "pip install 'modelwright[series]'") from None
    if ":" in name:
        module, _, cls = name.partition(":")
        try:
            kind = getattr(import_module(module), cls)
        except (ImportError, AttributeError) as error:
            raise UserError(f"learner '{name}' cannot be imported", short(error), "write module:Class") from None
    else:
        homes = [m for m in (import_module(f"sklearn.{p}") for p in (PLACES[:1] if name == DEFAULT else PLACES)) if hasattr(m, name)]
        kind = getattr(homes[0], name) if homes and name[:1].isupper() else None
        if not hasattr(kind, "predict") or not hasattr(kind, "fit"):
            raise UserError(f"scikit-learn has no regressor '{name}'", how=f"write one of its names, such as {DEFAULT} or Ridge")
    known = kind().get_params()
    usual = {"random_state": 0} if "random_state" in known else {}
    settings = usual | (SMALL_TREES if name == DEFAULT else {}) | settings
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"{name} has no setting '{unknown[0]}'", how=did_you_mean(unknown[0], known))
    return lambda: kind(**settings)
