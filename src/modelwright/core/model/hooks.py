"""Looking into and changing a running model; every hook is undone when the block ends, also after an error."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def capture(
    modules: Iterable[nn.Module], visit: Callable[[nn.Module, Tensor], Any], side: Literal["input", "output"] = "output"
) -> Iterator[None]:
    """Call `visit(module, tensor)` with each module's first input or output on every forward pass.

    Under gradient checkpointing a forward hook fires again in the recomputation; sums must guard against that.
    """

    def pre(module: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(module, (args[0] if args else kwargs["hidden_states"]).detach())

    def post(module: nn.Module, args: tuple, output: Any) -> None:
        visit(module, _first(output).detach())

    handles: list[Any] = []
    try:
        for m in modules:
            handles.append(m.register_forward_pre_hook(pre, with_kwargs=True) if side == "input" else m.register_forward_hook(post))
        yield
    finally:
        for h in handles:
            h.remove()


@contextmanager
def patch(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the module's (first) output by `change(output)` while the block runs."""

    def hook(m: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
