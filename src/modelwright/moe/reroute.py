"""Another routing for a stock model: a hook on each router turns its answer into a Routing, which our executor follows.

    with rerouted(model, change):           # change(layer, logits, weights, index, real) -> Routing, or None: as it is
        model(**batch)

No class is patched, and everything is undone after the block. Gradients flow through the router's own logits and weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.moe.execute import LOADED, NAME, PENDING, is_plain
from modelwright.moe.routing import Routing
from modelwright.moe.watch import padding, routers, shape

_TAKEN: WeakSet[nn.Module] = WeakSet()  # experts that follow somebody's routing
Change = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Routing | None]


def gated(model: nn.Module, what: str) -> list[tuple[Any, Any]]:
    """The routers of a model in order of depth, each with its experts; UserError where these are not plain: they cannot `what`."""
    found: list[tuple[Any, Any]] = [(router, model.get_submodule(path.rpartition(".")[0]).experts) for path, router in routers(model)]
    for _, experts in found:
        if not is_plain(experts):
            raise UserError(
                f"{type(experts).__name__} cannot {what}",
                "its experts are not gated layers without biases",
                "give a Mixtral-, Qwen-, OLMoE- or Granite-style mixture of experts",
            )
        if experts._is_expert_parallel and experts not in LOADED:
            raise UserError(
                f"{type(experts).__name__} cannot {what}",
                "its experts lie on several processes, and what brings tokens there follows the router alone",
                'load the model with DistributedConfig(..., ep_implementation="modelwright")',
            )
    return found


class Reroute:
    """The hooks of one model; `undo` takes them away."""

    def __init__(self, model: nn.Module, change: Change):
        self.real: Tensor | None = None  # (B, T) bool of the running batch
        self.known: Tensor | None = None  # the same for the next batch, where its call will not say it
        self.shape = (0, 0)  # (B, T) of the running batch
        found = gated(model, "follow another routing")
        if any(experts in _TAKEN for _, experts in found):
            raise UserError(
                f"{type(model).__name__} is rerouted already",
                "a second routing would replace the first",
                "reroute one way at a time, or load the model anew after a run that broke off",
            )
        self.layers, self._experts = len(found), [experts for _, experts in found]
        _TAKEN.update(self._experts)
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._before: list[tuple[Any, Any]] = []
        for i, (router, experts) in enumerate(found):
            if (name := experts.config._experts_implementation) != NAME:
                self._before.append((experts.config, name))
                experts.config._experts_implementation = NAME
            self._handles.append(router.register_forward_hook(self._turn(i, experts, change)))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shape = shape(args, kwargs)
        self.real, self.known = padding(kwargs.get("attention_mask"), self.shape[1]) if self.known is None else self.known, None

    def _turn(self, layer: int, experts: nn.Module, change: Change) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            real = None if self.real is None else self.real.reshape(-1).to(output[0].device)
            PENDING.pop(experts, None)  # left by a pass that was broken off
            if (routing := change(layer, output[0], output[1], output[2], real)) is not None:
                PENDING[experts] = routing

        return hook

    def undo(self) -> None:
        """Routers and executor as before."""
        for h in self._handles:
            h.remove()
        for config, name in reversed(self._before):
            config._experts_implementation = name
        _TAKEN.difference_update(self._experts)
        self._handles, self._before, self._experts = [], [], []


@contextmanager
def rerouted(model: nn.Module, change: Change) -> Iterator[Reroute]:
    """Reroute inside the block."""
    hooks = Reroute(model, change)
    try:
        yield hooks
    finally:
        hooks.undo()
