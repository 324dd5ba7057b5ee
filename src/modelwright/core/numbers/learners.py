"""Predictors of scikit-learn, or of any module, by name; imported when something is learnt, not before."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short


def found(name: str, places: tuple[str, ...], purpose: str) -> Any:
    """The class `module:Class`, or the one of that name in these modules of scikit-learn; None where there is none."""
    try:
        import_module("sklearn")
    except ImportError:
        raise UserError("scikit-learn is not installed", f"{purpose} is learnt with it", "pip install 'modelwright[series]'") from None
    if ":" in name:
        module, _, cls = name.partition(":")
        try:
            return getattr(import_module(module), cls)
        except (ImportError, AttributeError) as error:
            raise UserError(f"learner '{name}' cannot be imported", short(error), "write module:Class") from None
    homes = (import_module(f"sklearn.{p}") for p in places)
    return next((getattr(m, name) for m in homes if name[:1].isupper() and hasattr(m, name)), None)


def fresh(kind: Any, name: str, settings: dict[str, Any], seed: int = 0) -> Callable[[], Any]:
    """A maker of fresh, seeded predictors. UserError for a setting that the class has not."""
    known = kind().get_params()
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"{name} has no setting '{unknown[0]}'", how=did_you_mean(unknown[0], known))
    usual = {"random_state": seed} if "random_state" in known else {}
    return lambda: kind(**(usual | settings))
