"""What a dense model would do with only some of its neurons: the split, without saving it.

Serves the choices that no stock class holds (oracle, MLP, compensation), in benchmarks, and tests compare a saved result with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.model.anatomy import Anatomy
from modelwright.reshape.experts.select import masses


@dataclass
class Plan:
    """For one layer: labels (F,), -1 always on; `score(x (n, d), mass (n, E))` -> (n, E); k experts are on.

    With `mean` (F,) the neurons of the others give their mean activation instead of 0: compensation, which is a fixed vector
    added to the output for each set of experts.
    """

    labels: Tensor
    score: Callable[[Tensor, Tensor], Tensor]
    k: int
    mean: Tensor | None = None

    @property
    def experts(self) -> int:
        return int(self.labels.max()) + 1


@contextmanager
def simulated(model: Any, plans: dict[int, Plan]) -> Iterator[None]:
    """Inside the block each planned layer of a dense model uses the k experts of highest score only."""
    anatomy = Anatomy(model)
    handles: list[Any] = []
    seen: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[layer] = x.reshape(-1, x.shape[-1])

        return pre

    def mask(layer: int, plan: Plan, norm: Tensor) -> Any:
        def pre(module: nn.Module, args: tuple) -> tuple:
            h = args[0].reshape(-1, args[0].shape[-1])
            chosen = plan.score(seen[layer], masses(h.abs() * norm, plan.labels, plan.experts)).topk(plan.k, 1).indices
            on = torch.zeros(len(h), plan.experts + 1, dtype=h.dtype, device=h.device)
            on.scatter_(1, chosen, 1.0)[:, -1] = 1.0  # label -1 is the last column
            keep = on[:, plan.labels]
            h = h * keep if plan.mean is None else h * keep + plan.mean * (1 - keep)
            return (h.view_as(args[0]), *args[1:])

        return pre

    try:
        for layer, plan in plans.items():
            b = anatomy.block(layer)
            down = model.get_submodule(anatomy.ffn(b).down.name.rpartition(".")[0])
            norm = anatomy.ffn(b).down.read(model.get_parameter).detach().norm(dim=0)
            handles.append(b.feed_forward.register_forward_pre_hook(note(layer), with_kwargs=True))
            handles.append(down.register_forward_pre_hook(mask(layer, plan, norm)))
        yield
    finally:
        for h in handles:
            h.remove()
