"""DHA: fewer key and value heads, found and fused while the model trains, each layer as many as it needs (arXiv 2406.06567).

When to use it: a model with many key and value heads is to serve long texts, and there is compute for a little training. Without
training: reshape.gqa. The paper keeps 25 % of the cache of LLaMA-2-7B after 0.2B tokens of fusion, and then trains on for 5B tokens
(tune.full).

Every head of a layer becomes a linear mix of the layer's heads, keys and values apart, which begins as itself:

    W~_i = sum_j omega_ij W_j,   omega = identity:   the function is unchanged at step 0

1. Search, for `search` steps: next-token loss + search_weight * L. Rows of omega of heads that can stand for each other drift together;
   cost_ij = mean_k (omega_ik - omega_jk)^2. For each layer and kind heads are grouped for every number of groups, and the budget is shared
   out so that the sum of what remains is least (tune/heads/grouping.py). The mixes are then folded into the weights, omega = identity.
2. Fusion: omega mixes within groups only, and L = mean over groups of mean_{i<i'} mean_j (omega_ij - omega_i'j)^2 is held to a target that
   falls from its first value to 0, by an augmented Lagrangian (core/train/constraint.py).
3. At the end the rows of a group are averaged, and one head stands for all: "residual" in the report is what the mean changes.

No official code was found; the search's loss, the costs and the ways to group and to share out are reconstructions. Ours: models with
grouped queries, biases, norms of keys; `export: gqa` gives a stock class, with one number of heads and the same groups for keys and values
(queries are put in the order of their groups); `grouping: neighbours` and `layers: uniform` are the controls. omega acts on what the
projections give, which is the same as on their rows and takes no copy of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.constraint import Constrained, Goal, detach
from modelwright.core.train.loop import steps_for
from modelwright.core.train.technique import Technique
from modelwright.tune.heads.grouping import grouped, spend, within
from modelwright.tune.heads.mixes import costs_of, fusion_loss, group_rows, mixed, together


@dataclass(frozen=True)
class Knobs(Tune):
    budget: float = knob(0.25, "share of the key and value heads that stays", low=0, high=1)
    search: int = knob(240, "steps that look for heads that can stand for each other", low=0)
    grouping: Literal["learned", "neighbours"] = knob("learned", "groups from the search, or neighbours (no search)")
    layers: Literal["adaptive", "uniform"] = knob("adaptive", "heads are shared out over layers and kinds by cost, or evenly")
    export: Literal["dha", "gqa"] = knob("dha", "our class, or a stock class with one number of heads for all layers and both kinds")
    search_weight: float = knob(1.0, "search: weight of the fusion loss", low=0)
    warm_up: float = knob(0.7, "share of the fusion in which the target falls to 0", low=0.01, high=1)
    omega_lr: float = knob(1e-2, "learning rate of the mixes", low=0)
    multiplier_lr: float = knob(1.0, "learning rate of the multipliers", low=0)


class Fusion(nn.Module):
    """omega of each layer, for keys and values: (layers, 2, heads, heads)."""

    def __init__(self, layers: int, heads: int):
        super().__init__()
        self.omega = nn.Parameter(torch.eye(heads).repeat(layers, 2, 1, 1))


class Dha(Constrained):
    """Mixes as hooks on the key and value projections, groups after the search, one head for each group in what is saved."""

    name = "dha"
    supports = frozenset({"ddp", "fused", "gradient_checkpointing"})

    def __init__(self, knobs: Knobs):
        super().__init__(knobs.omega_lr, knobs.multiplier_lr, knobs.warm_up)
        self.knobs = knobs
        self.search = 0 if knobs.grouping == "neighbours" else knobs.search
        self.groups_of: Tensor | None = None  # (layers, 2, heads): the group of each head, once they are found
        self._omega: Tensor | None = None  # of the pass that is under way
        self._hooks: list[Any] = []

    # ---- before training
    def settings(self, rows: TokenRows, train: Train) -> Train:
        if (steps := steps_for(rows, train)) <= self.search + 1:
            raise UserError(
                f"the run has {steps} steps and the search takes {self.search}", "heads are fused after it", "train longer, or lower search"
            )
        return train

    def build(self, model: Any, anatomy: Anatomy) -> nn.Module:
        self.heads = _checked(model, anatomy, self.knobs)
        self.sites = [[anatomy.attention(b)[kind].name.rpartition(".")[0] for kind in "kv"] for b in anatomy.blocks]
        for layer, names in enumerate(self.sites):
            for kind, name in enumerate(names):
                self._hooks.append(model.get_submodule(name).register_forward_hook(self._mix(layer, kind)))
        if self.search == 0:
            costs = torch.zeros(len(self.sites), 2, self.heads, self.heads)
            self.groups_of = self._neighbours() if self.knobs.grouping == "neighbours" else self._grouped(costs)
        return Fusion(len(self.sites), self.heads)

    def aims(self, parts: nn.Module) -> dict[str, Goal]:
        return {"fusion": Goal(0.0)}

    def _mix(self, layer: int, kind: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            if self._omega is None:
                return out
            x = out.unflatten(-1, (self.heads, -1))  # (B, T, heads, d)
            return torch.einsum("ij,btjd->btid", self._omega[layer, kind].to(x.dtype), x).flatten(-2)

        return hook

    # ---- each step
    def enter(self, parts: Any, training: bool) -> None:
        self._omega = self._masked(parts.omega)

    def _masked(self, omega: Tensor) -> Tensor:
        """omega with nothing outside the groups."""
        return omega if self.groups_of is None else omega * together(self.groups_of).to(omega)

    def _labels(self) -> Tensor:
        found = self.groups_of
        return torch.zeros(len(self.sites), 2, self.heads, dtype=torch.long) if found is None else found

    def values(self, parts: Any) -> dict[str, Tensor]:
        return {"fusion": fusion_loss(self._masked(parts.omega), self._labels())}

    def target(self, name: str) -> float:
        steps = max(self.steps - self.search, 1)
        return Goal(0.0, self._begin()).at((self.step - self.search) / (self.warm_up * steps))

    def _begin(self) -> float:
        """The fusion loss of mixes that are the identity."""
        return float(fusion_loss(torch.eye(self.heads).repeat(len(self.sites), 2, 1, 1), self._labels()))

    def penalty(self) -> Tensor:
        if self.step >= self.search:
            return super().penalty()
        top = self.model.get_submodule("constraint")
        value = self.values(top["parts"])["fusion"]
        self.measured["fusion"] = float(value.detach())
        unused = sum(p.sum() for p in top["multipliers"].parameters())  # under DDP every parameter takes part in every pass
        return self.knobs.search_weight * value + 0 * unused

    @torch.no_grad()
    def leave(self, parts: Any) -> None:
        if self.step != self.search or self.groups_of is not None:
            return
        self._fold(parts.omega)
        self.groups_of = self._grouped(costs_of(parts.omega))
        parts.omega.copy_(torch.eye(self.heads))
        if self.optimizer is not None:
            self.optimizer.state.pop(parts.omega, None)

    def _fold(self, omega: Tensor) -> None:
        """Put the mixes into the weights: what the model computes stays."""
        for layer, names in enumerate(self.sites):
            for kind, name in enumerate(names):
                for p in self.model.get_submodule(name).parameters(recurse=False):
                    p.copy_(mixed(p, omega[layer, kind]))

    def _grouped(self, costs: Tensor) -> Tensor:
        """Groups (layers, 2, heads) from costs (layers, 2, heads, heads)."""
        k, m, layers = self.knobs, self.heads, len(self.sites)
        if k.export == "gqa":
            both = [torch.from_numpy(grouped(c.sum(0).double().cpu().numpy(), round(k.budget * m), equal=True)) for c in costs]
            return torch.stack(both)[:, None].repeat(1, 2, 1)
        items = [c.double().cpu().numpy() for c in costs.flatten(0, 1)]
        if k.layers == "uniform":
            counts = [round(k.budget * m)] * len(items)
        else:
            left = [[within(c, grouped(c, n)) for n in range(1, m + 1)] for c in items]
            counts = spend(left, round(k.budget * m * len(items)))
        labels = [torch.from_numpy(grouped(c, n)) for c, n in zip(items, counts, strict=True)]
        return torch.stack(labels).view(layers, 2, m)

    def _neighbours(self) -> Tensor:
        size = self.heads // round(self.knobs.budget * self.heads)
        return (torch.arange(self.heads) // size).expand(len(self.sites), 2, -1).clone()

    # ---- resume and report
    def liveness(self, moved: dict[str, Tensor]) -> str:
        if self.search == 1:  # the mixes of the first step are in the weights already
            return Technique.liveness(self, moved)
        return super().liveness(moved)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"groups": self.groups_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.groups_of = state["groups"]

    def facts(self) -> dict[str, Any]:
        found = self._labels()
        told = {n: ", ".join(str(int(x.max()) + 1) for x in found[:, i]) for i, n in enumerate(("key heads", "value heads"))}
        kept = int((found.amax(-1) + 1).sum())
        told["heads kept"] = f"{kept} of {2 * self.heads * len(self.sites)}"
        if self.measured.get("fusion", 0.0) > 0.05 * self._begin():
            told["note"] = "the heads of a group still differ, and their mean is saved: train longer, or raise omega_lr"
        return super().facts() | told

    # ---- what is saved
    @torch.no_grad()
    def export(self, model: Any, folder: Path) -> Any:
        from modelwright.models.dha import narrowed, packed

        for h in self._hooks:
            h.remove()
        omega, labels = self._masked(detach(model).omega.detach()), self._labels()  # type: ignore[operator]
        fused: dict[str, Tensor] = {}
        for layer, names in enumerate(self.sites):
            for kind, name in enumerate(names):
                rows = group_rows(omega[layer, kind], labels[layer, kind])
                for last, p in model.get_submodule(name).named_parameters(recurse=False):
                    fused[f"{name}.{last}"] = mixed(p, rows)
        queries = model.config.num_attention_heads // self.heads  # of one head
        if self.knobs.export == "dha":
            maps = labels.repeat_interleave(queries, -1)
            return packed(model, maps[:, 0].tolist(), maps[:, 1].tolist(), fused)
        for layer in range(len(self.sites)):
            fused |= self._reordered(model, layer, labels[layer, 0].argsort(stable=True), queries)
        return narrowed(model, int(labels.max()) + 1, fused)

    def _reordered(self, model: Any, layer: int, order: Tensor, queries: int) -> dict[str, Tensor]:
        """Query and output projections with the queries of a group side by side."""
        views = Anatomy(model).attention(layer)
        found = {}
        for n in ("q", "q.bias", "o"):
            if n not in views:
                continue
            tensor = model.get_parameter(views[n].name)
            rows = tensor.T if n == "o" else tensor
            moved = rows.unflatten(0, (self.heads, queries, -1))[order].flatten(0, 2)
            found[views[n].name] = (moved.T if n == "o" else moved).contiguous()
        return found


def _checked(model: Any, anatomy: Anatomy, k: Knobs) -> int:
    """The model's key and value heads; UserError where it has no class with fewer, or the budget leaves none."""
    from modelwright.models.dha import CLASSES

    name, config = type(model).__name__, model.config
    if config.model_type not in CLASSES:
        why = "its query, key and value projections are one matrix" if any(p.role == "attn.qkv" for p in anatomy) else ""
        raise UserError(
            f"{name} cannot have its heads decoupled", why or f"only {', '.join(CLASSES)} models have a class for it", "give such a model"
        )
    heads = int(config.num_key_value_heads)
    wanted = k.budget * heads
    if heads == 1 or wanted < 1 or k.budget == 1:
        why = f"{name} has {heads} key and value head{'s' * (heads > 1)} in a layer"
        raise UserError(f"budget={k.budget} does not fit", why, f"give {1 / heads:.4g} or more, and less than 1" if heads > 1 else "")
    even = k.export == "gqa" or k.layers == "uniform" or k.grouping == "neighbours"
    fits = [n for n in range(1, heads) if heads % n == 0 or (k.export == "dha" and k.grouping == "learned")]
    if even and (round(wanted) not in fits or abs(round(wanted) - wanted) > 0.01):
        shares = ", ".join(f"{n / heads:.4g}" for n in fits)
        raise UserError(f"budget={k.budget} of {heads} heads is no number that all layers can have", "", f"give one of {shares}")
    return heads


METHOD = Dha
