"""modelwright: a workshop for language models. One recipe, one command, one Python call per method, each with its proof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Checkpoint", "UserError", "run", "run_recipe"]

if TYPE_CHECKING:
    from modelwright.core.checkpoint import Checkpoint
    from modelwright.core.errors import UserError
    from modelwright.runner import run, run_recipe

_HOMES = {"Checkpoint": "core.checkpoint", "UserError": "core.errors", "run": "runner", "run_recipe": "runner"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"modelwright.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'modelwright' has no attribute '{name}'")
