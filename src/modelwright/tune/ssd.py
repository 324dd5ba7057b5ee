"""SSD, Switchable Sparse-Dense learning: by turns the whole feed-forward parts train, or some experts of them (arXiv 2410.03440).

When to use it: you pre-train a ReLU model, or go on pre-training it, and want to spend fewer FLOPs, or a checkpoint that serves dense
and as a mixture. Activations become sparse early in training and stay so; which neurons fire together settles later. So the
feed-forward parts are split into experts once their groups are stable, a while only the chosen experts run and learn, then all do again.
The paper tells of 1.44 times fewer FLOPs in pre-training and inference up to twice as fast.

Every `check_every` dense steps, for each layer, from the rows that read the input (normalised; of the gate where there is one):

    warm, cold = balanced k-means from the former groups, and from scratch; the tighter one is kept       (moe/partition.py)
    similarity = adjusted Rand index of warm and the former groups;  zeros = share of activations that are 0

Sparse follows where the mean similarity is at least `stable` and zeros at least `zeros`. The neurons are then put in the order of their
groups, weights and the optimizer's moments alike, so that neither the function nor the next step changes; going back to dense needs
nothing. In a sparse step a token runs through the `top_k` experts of highest x . c_e, c_e the mean normalised row of an expert, with
coefficient 1 (tune/neurons/layer.py). The learning rate goes on; the last `final_dense` of the run is dense. Evaluations are dense.

From the official code (thunlp, the conversion alone): k-means from the former groups and from scratch, permuted weights, the centres as
router. Reconstructions: the measure of similarity, both thresholds, the lengths of the turns. Ours: centres follow the weights in each
step; experts are not balanced and no token is dropped; weight decay of a sparse step takes only rows that have a gradient, else neurons
that are not chosen would shrink without learning; FLOPs are counted for each step, clustering left out. Dropout inside a feed-forward
part is off in sparse steps. Similarity is not taken of `cold`: k-means from scratch finds other groups of the same weights each time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.loop import steps_for
from modelwright.core.train.technique import Named, Technique
from modelwright.moe.partition import balanced_kmeans, even_sizes
from modelwright.tune.neurons.layer import Layer, activation, rand_index


@dataclass(frozen=True)
class Knobs(Tune):
    experts: int = knob(32, "experts of each feed-forward part", low=2)
    top_k: int = knob(8, "experts per token in a sparse step", low=1)
    check_every: int = knob(500, "dense steps between two looks at the groups", low=1)
    sparse_steps: int | None = knob(None, "steps of a sparse turn; empty: as many as check_every", low=1)
    stable: float = knob(0.9, "similarity of the groups from which on a sparse turn may begin", low=-1, high=1)
    zeros: float = knob(0.8, "share of zero activations from which on it may", low=0, high=1)
    final_dense: float = knob(0.1, "share of the steps at the end that are dense", low=0, high=1)
    sparse_decay: bool = knob(True, "weight decay of sparse steps takes only neurons that learn")


class Ssd(Technique):
    """Takes the place of the feed-forward parts' forward; its state is the phase and the groups."""

    name = "ssd"
    supports = frozenset({"ddp", "fused", "gradient_checkpointing"})

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.step, self.turn, self.seed = 0, 0, 0  # steps that are done, and of the present turn
        self.sparse = False
        self.labels: list[Tensor] = []  # the group of each neuron at the last look, by layer
        self.looks: list[dict[str, float]] = []
        self.turns: list[int] = []  # steps at which a sparse turn began
        self.flops = {"spent": 0.0, "dense": 0.0, "sparse steps": 0.0}
        self._zeros = [0.0, 0.0]  # activations that are 0, and all, in the step that is under way
        self._hooks: list[Any] = []

    # ---- before training
    def settings(self, rows: TokenRows, train: Train) -> Train:
        if train.optimizer not in ("adamw", "adamw_torch", "adamw_torch_fused", "sgd"):
            raise UserError(
                f"ssd does not work with the optimizer {train.optimizer}", "its moments cannot be put in another order", "use adamw or sgd"
            )
        steps, first = steps_for(rows, train), self.knobs.check_every
        if steps <= first:
            raise UserError(f"the run has {steps} steps and the first look is after {first}", how="train longer, or lower check_every")
        return train

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        k, name = self.knobs, type(model).__name__
        if anatomy.experts:
            raise UserError(f"{name} is a mixture of experts already", how="give a dense model")
        if k.top_k > k.experts:
            raise UserError(f"top_k={k.top_k} but there are {k.experts} experts", how="lower top_k or raise experts")
        act = activation(anatomy.config)
        if k.zeros > 0 and "relu" not in act:
            raise UserError(f"zeros={k.zeros} is never reached", f"{act} is hardly ever exactly 0", "give a ReLU model, or zeros=0")
        self.layers = [Layer(model, anatomy, b, k.experts, k.top_k) for b in anatomy.blocks]
        for layer in self.layers:
            even_sizes(layer.neurons, k.experts)
            layer.require_module(name)
        for layer in self.layers:
            layer.module.forward = self._forward(layer, layer.module.forward)
            down = model.get_submodule(layer.views.down.name.rpartition(".")[0])
            self._hooks.append(down.register_forward_pre_hook(self._count))
        self._anatomy = anatomy
        return model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        self.seed = seed

    def _forward(self, layer: Layer, dense: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return layer.sparse(x) if self.sparse and layer.module.training else dense(x, *args, **kwargs)

        return forward

    def _matrices(self, named: Named) -> list[tuple[nn.Parameter, int]]:
        """The matrices of the feed-forward parts that train, and the dimension of their neurons."""
        dims = {name: dim for layer in self.layers for name, dim in layer.matrices().items()}
        return [(p, dims[n]) for n, p in named if n in dims and p.requires_grad]

    def groups(self, named: Named) -> list[dict[str, Any]]:
        if not self._decays():
            return []
        return [{"params": [p for p, _ in self._matrices(named)], "weight_decay": 0.0}]  # done in on_gradients

    def _decays(self) -> bool:
        return self.knobs.sparse_decay and self.knobs.train.weight_decay > 0

    # ---- each step
    def before_batch(self, batch: dict[str, Tensor]) -> None:
        real, context = float(batch["real"].sum()), batch["input_ids"].shape[1]
        dense = 3 * self._anatomy.flops_per_token(context)
        weights = sum(layer.size() for layer in self.layers)
        routers = sum(layer.experts * int(layer.rows().shape[1]) for layer in self.layers)
        saved = 6 * (1 - self.knobs.top_k / self.knobs.experts) * weights - 2 * routers  # routers run forward only
        self.flops["dense"] += real * dense
        self.flops["spent"] += real * (dense - (saved if self.sparse else 0))

    def _looks_next(self) -> bool:
        return not self.sparse and (self.turn + 1) % self.knobs.check_every == 0

    def _count(self, module: nn.Module, args: tuple) -> None:
        if module.training and self._looks_next():
            self._zeros[0] += float((args[0] == 0).sum())
            self._zeros[1] += args[0].numel()

    @torch.no_grad()
    def on_gradients(self, named: Named) -> None:
        if not self._decays() or self.optimizer is None:
            return
        rate = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        for p, dim in self._matrices(named):
            if p.grad is None:
                continue
            kept = 1 - rate[id(p)] * self.knobs.train.weight_decay
            if not self.sparse:
                p.mul_(kept)
                continue
            learns = (p.grad != 0).any(1 - dim, keepdim=True)
            p.mul_(torch.where(learns, kept, 1.0))

    def after_step(self, named: Named) -> None:
        self.flops["sparse steps"] += self.sparse
        looks, k = self._looks_next(), self.knobs
        self.step, self.turn = self.step + 1, self.turn + 1
        last = self.step >= self.steps - round(k.final_dense * self.steps)
        if self.sparse and (last or self.turn >= (k.sparse_steps or k.check_every)):
            self.sparse, self.turn = False, 0
        if looks and self.look() and not last:
            self.arrange()
            self.sparse, self.turn = True, 0
            self.turns.append(self.step)

    def look(self) -> bool:
        """Group the neurons anew; whether they are stable and sparse enough."""
        found = dist.broadcast(self._grouped()) if dist.world() > 1 else self._grouped()
        self.labels, alike = [labels for labels, _ in found], [similarity for _, similarity in found]
        zero, count = dist.sum_over_ranks(*(torch.tensor(v, dtype=torch.float64) for v in self._zeros))
        self._zeros = [0.0, 0.0]
        seen = {"step": float(self.step), "similarity": sum(alike) / len(alike), "zeros": float(zero) / max(float(count), 1.0)}
        self.looks.append(seen)
        return seen["similarity"] >= self.knobs.stable and seen["zeros"] >= self.knobs.zeros

    def _grouped(self) -> list[tuple[Tensor, float]]:
        """Of each layer the groups, and how alike the former ones are to what k-means makes of them (-1: there are none)."""
        found = []
        for i, layer in enumerate(self.layers):
            rows = layer.rows().detach().float().cpu()
            kept = cold = balanced_kmeans(rows, self.knobs.experts, seed=self.seed)
            similarity = -1.0
            if self.labels:
                warm = balanced_kmeans(rows, self.knobs.experts, labels=self.labels[i])
                similarity, kept = rand_index(self.labels[i], warm[0]), warm if warm[2] <= cold[2] else cold
            found.append((kept[0], similarity))
        return found

    def arrange(self) -> None:
        """Put the neurons in the order of their groups."""
        for i, layer in enumerate(self.layers):
            order = self.labels[i].argsort(stable=True)
            layer.permute(order, self.optimizer)
            self.labels[i] = self.labels[i][order]

    # ---- resume, report, save
    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("step", "turn", "sparse", "labels", "looks", "turns", "flops")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, v in state.items():
            setattr(self, k, v)

    def facts(self) -> dict[str, Any]:
        told: dict[str, Any] = {k: ", ".join(f"{x[k]:.3f}" for x in self.looks) for k in ("similarity", "zeros")}
        told["sparse turns begin after steps"] = ", ".join(map(str, self.turns)) or "none"
        told["sparse steps"] = int(self.flops["sparse steps"])
        spent, dense = self.flops["spent"], self.flops["dense"]
        return told | {"training FLOPs": spent, "of those of dense training": round(spent / max(dense, 1.0), 4)}

    def export(self, model: Any, folder: Path) -> Any:
        for layer in self.layers:
            del layer.module.forward
        for h in self._hooks:
            h.remove()
        return model


METHOD = Ssd
