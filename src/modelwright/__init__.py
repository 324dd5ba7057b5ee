"""modelwright: a workshop for language models. One recipe, one command, one Python call per method, each with its proof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["NACL", "Calibrator", "Checkpoint", "Technique", "UserError", "evict", "run", "run_recipe"]

if TYPE_CHECKING:
    from modelwright.cache.engine.evict import evict
    from modelwright.cache.evictors.nacl import NACL
    from modelwright.core.errors import UserError
    from modelwright.core.model.checkpoint import Checkpoint
    from modelwright.core.train.technique import Technique
    from modelwright.reward.calibrate import Calibrator
    from modelwright.runner.run import run, run_recipe

_HOMES = {
    "NACL": "cache.evictors.nacl",
    "Calibrator": "reward.calibrate",
    "Checkpoint": "core.model.checkpoint",
    "Technique": "core.train.technique",
    "UserError": "core.errors",
    "evict": "cache.engine.evict",
    "run": "runner.run",
    "run_recipe": "runner.run",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `import modelwright` itself is light."""
    if name in _HOMES:
        return getattr(import_module(f"modelwright.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'modelwright' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
