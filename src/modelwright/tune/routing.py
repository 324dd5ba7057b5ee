"""What the ways to tune with another routing share: hooks while training, and the stock model again at the end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.anatomy import Anatomy
from modelwright.core.errors import UserError
from modelwright.core.technique import Technique
from modelwright.moe.balance import recomputing
from modelwright.moe.reroute import Reroute
from modelwright.moe.routing import Routing


class Rerouted(Technique):
    """A technique that changes routing. Override `change`; rows of the list by source are counted for the report."""

    name = "rerouted"
    evaluates = False  # whether evaluation is rerouted too

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        if not anatomy.experts:
            raise UserError(
                f"{self.name}: {type(anatomy.model).__name__} has no experts", "there is nothing to route", "make some with reshape.upcycle"
            )
        self.top_k = anatomy.top_k
        self.model, self.routed, self.tokens = model, torch.zeros(4, dtype=torch.long), 0
        self.hooks = Reroute(model, self._turn)

    def change(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        """The routing of a layer; None: as the router has it."""
        raise NotImplementedError

    def _turn(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        if not (self.model.training or self.evaluates):
            return None
        routing = self.change(layer, logits, weights, index, real)
        if self.model.training and routing is not None and not recomputing():
            self.routed += routing.source.cpu().bincount(minlength=4)
            self.tokens += len(logits) if real is None else int(real.sum())
        return routing

    def liveness(self, moved: dict[str, Tensor]) -> str:
        if not self.tokens:
            raise RuntimeError(f"{self.name}: no router was heard")
        return super().liveness(moved)

    def state_dict(self) -> dict[str, Any]:
        return {"routed": self.routed, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.routed, self.tokens = state["routed"], state["tokens"]

    def export(self, model: Any, folder: Path) -> Any:
        self.hooks.undo()
        return model
