"""A classifier of scikit-learn by name, seeded; imported when something is learnt, not before."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short

DEFAULT = "HistGradientBoostingClassifier"
PLACES = ("ensemble", "linear_model", "naive_bayes", "neighbors", "neural_network", "tree", "svm", "gaussian_process", "dummy")


def classifier(name: str, settings: dict[str, Any], seed: int) -> Callable[[], Any]:
    """A maker of fresh classifiers with probabilities: the name of one in scikit-learn, or module:Class."""
    try:
        import_module("sklearn")
    except ImportError:
        raise UserError("scikit-learn is not installed", "quality is learnt with it", "pip install 'modelwright[series]'") from None
    if ":" in name:
        module, _, cls = name.partition(":")
        try:
            kind = getattr(import_module(module), cls)
        except (ImportError, AttributeError) as error:
            raise UserError(f"learner '{name}' cannot be imported", short(error), "write module:Class") from None
    else:
        homes = [m for m in (import_module(f"sklearn.{p}") for p in (PLACES[:1] if name == DEFAULT else PLACES)) if hasattr(m, name)]
        kind = getattr(homes[0], name) if homes and name[:1].isupper() else None
    if not hasattr(kind, "predict_proba") or not hasattr(kind, "fit"):
        raise UserError(f"'{name}' is no classifier with probabilities", how=f"write a name of scikit-learn, such as {DEFAULT}")
    known = kind().get_params()
    settings = ({"random_state": seed} if "random_state" in known else {}) | settings
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"{name} has no setting '{unknown[0]}'", how=did_you_mean(unknown[0], known))
    return lambda: kind(**settings)
