"""What the ways to tune with another routing share: hooks while training, and the stock model again at the end."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.moe.balance import recomputing
from modelwright.moe.reroute import Reroute, gated
from modelwright.moe.routing import Routing


class Rerouted(Technique, ABC):
    """A technique that changes routing. Rows of the list by source are counted for the report, over all processes."""

    name = "rerouted"
    adds_weights = False  # hooks alone
    evaluates = False  # whether evaluation is rerouted too
    renormalises = False  # whether its weights sum to 1

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        if not anatomy.experts:
            raise UserError(
                f"{self.name}: {type(anatomy.model).__name__} has no experts", "there is nothing to route", "make some with reshape.upcycle"
            )
        gated(model, "follow another routing")
        self.top_k = anatomy.top_k
        self.model, self.routed, self.tokens = model, torch.zeros(4, dtype=torch.long), 0
        self._checked: set[int] = set()  # layers whose router was found to be a softmax
        self._mine = torch.zeros(5, dtype=torch.long)  # of this process's batch: rows by source, tokens

    def terms(self) -> list[LossTerm]:
        # The hooks come last: what is probed, or copied before it is sharded, is the stock model.
        self.hooks = Reroute(self.model, self._turn)
        return super().terms()

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        if "segments" in batch:  # packed rows have no attention mask
            self.hooks.known = batch["real"]

    @abstractmethod
    def change(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        """The routing of a layer; None: as the router has it."""

    def _turn(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        if not (self.model.training or self.evaluates):
            return None
        if layer not in self._checked:
            self._checked.add(layer)
            self._require_softmax(logits.detach(), weights.detach(), index)
        routing = self.change(layer, logits, weights, index, real)
        if self.model.training and not recomputing():
            if routing is not None:
                self._mine[:4] += routing.source.cpu().bincount(minlength=4)
                self._mine[4] += len(logits) if real is None else int(real.sum())
            if layer == self.hooks.layers - 1:  # here, as a state is saved by the first process alone
                *routed, tokens = dist.all_sum(self._mine).tolist()
                self.routed, self.tokens = self.routed + torch.tensor(routed), self.tokens + tokens
                self._mine.zero_()
        return routing

    def _require_softmax(self, logits: Tensor, weights: Tensor, index: Tensor) -> None:
        """UserError unless a router chooses and weighs experts as the new rows are weighed, so that nothing else changes."""
        given = weights.float() if self.renormalises else weights.float() / weights.float().sum(1, keepdim=True)
        chosen, near = logits.float().gather(1, index), max(1e-4, 2 * torch.finfo(weights.dtype).eps)
        best, found = logits.float().topk(index.shape[1]).values, chosen.sort(descending=True).values
        if not (torch.allclose(given, chosen.softmax(1), 0, near, equal_nan=True) and torch.equal(best.nan_to_num(), found.nan_to_num())):
            unnormalised = "norm_topk_prob is false, or " if self.renormalises else ""
            raise UserError(
                f"{self.name} does not go with the routers of {type(self.model).__name__}",
                f"they do not weigh the best experts by a softmax over them: {unnormalised}scores are a sigmoid's or have a bias",
                "give a Mixtral- or Granite-style model" + (", or set norm_topk_prob: true in config.json" if unnormalised else ""),
            )

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
