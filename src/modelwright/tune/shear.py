"""Targeted structured pruning (Sheared LLaMA, arXiv 2310.06694): a model is cut to a given smaller shape while it trains.

When to use it: a strong model is too large, and a smaller one of a standard shape is to serve. Pruning costs little beside training that
shape from the start; the paper prunes LLaMA2-7B on 0.4B tokens (lr 1e-4) and trains what is left on 50B more. Do the same: a step of
tune.shear, then a step of tune.full or tune.dynamic_batch. What comes right out of this step is much worse than its source.

Gates (hard concrete, core/train/constraint.py) stand on blocks, on key-value heads with their queries, on neurons and on the dimensions of
the stream; tune/pruning/smaller.py says where they multiply. One draw a step is shared by all its rows. For each kind m:

    loss = LM + sum over m of mean over blocks (lambda1_m (v_m - t_m) + lambda2_m (v_m - t_m)^2)

v is the expected share of open gates, t falls from 1 to what the shape asks over the share `ramp` of the steps; every block is held to it,
so that all blocks end with one width. In evaluation there is no noise, and the gates that are likeliest closed are 0: as many as are
expected to be, and after the last step as many as the shape asks for. The gates that are left keep their value and are multiplied into the
weights, so the saved model gives what the masked one gives. It is of the source's class, head width unchanged.

The official code supports heads without groups, LLaMA and Pythia, and has two faults that are not repeated (see smaller.py). Ours: units of
whole key-value groups; gates in evaluation are stretched, so that they are exactly 1 at the start, where the official ones are 0.996. The
rates are the paper's for 3,200 steps; short runs want `multiplier_lr` several times larger.

Other values of `how` choose the units once, at the start, by a rule (tune/pruning/scores.py), and train what is left for the same steps.
They are the baselines, behind the same export.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.constraint import BETA, Constrained, Gates, Goal, detach, keep_largest, open_probability, settled
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.tune.pruning.scores import scores
from modelwright.tune.pruning.smaller import KINDS, Shape, require_fit, smaller

_MOST = math.log(100)  # of log_alpha
_LEAST = 0.01  # a gate that stays is not smaller


@dataclass(frozen=True)
class Knobs(Tune):
    layers: int | None = knob(None, "blocks afterwards; empty: as many as there are", low=1)
    heads: int | None = knob(None, "query heads afterwards, in whole groups of a key-value head; empty: as many as there are", low=1)
    ffn: int | None = knob(None, "neurons per block afterwards; empty: as many as there are", low=1)
    hidden: int | None = knob(None, "width of the stream afterwards; empty: as it is", low=1)
    how: Literal["learnt", "magnitude", "activation", "random", "uniform"] = knob(
        "learnt", "learnt, or chosen once: by weights, by activations and block influence, by lot, evenly spaced"
    )
    ramp: float = knob(0.2, "share of the steps over which targets fall", low=0, high=1)
    mask_lr: float = knob(1.0, "learning rate of log_alpha", low=0)
    multiplier_lr: float = knob(1.0, "learning rate of lambda1 and lambda2", low=0)


class Shear(Constrained):
    """Adds gates to all kinds of units that are to become fewer."""

    name = "shear"

    def __init__(self, knobs: Knobs):
        super().__init__(knobs.mask_lr, knobs.multiplier_lr, knobs.ramp)
        self.knobs = knobs
        self.keep: dict[str, int] = {}  # units of each kind that stay, where some go
        self.chosen: dict[str, Tensor] = {}  # gates that were chosen once
        self.z: dict[str, Tensor] = {}
        self.kept_layers: list[int] = []
        self.seed = 0

    # ---- what is added
    def build(self, model: Any, anatomy: Anatomy) -> nn.Module:
        k = self.knobs
        asked = {n: v for n in KINDS if (v := getattr(k, n)) is not None}
        require_fit(anatomy, set(asked))
        self.shape = s = Shape.of(anatomy.config)
        if k.heads is not None:
            if k.heads % s.queries:
                raise UserError(
                    f"shear: heads={k.heads} cuts a group in two",
                    f"the model has {s.queries} query heads for each key-value head, which go together",
                    f"give a multiple of {s.queries}",
                )
            asked["heads"] = k.heads // s.queries
        for kind, n in asked.items():
            has = getattr(s, kind)
            if n > has:
                times = s.queries if kind == "heads" else 1
                raise UserError(f"shear: {kind}={n * times} is more than the model has", f"it has {has * times}", "give a smaller one")
        self.keep = {n: v for n, v in asked.items() if v < getattr(s, n)}
        if not self.keep:
            raise UserError(
                "shear: nothing is to become smaller", "no size below the model's was given", "give layers, heads, ffn or hidden"
            )
        self._find(model, anatomy)
        begin = {n: Gates(s.gates(n), 5.0, 0, stream, spread=0.1) for stream, n in enumerate(KINDS) if n in self.keep}
        return nn.ModuleDict(begin)

    def _find(self, model: Any, anatomy: Anatomy) -> None:
        """The modules that gates act in."""

        def module(name: str) -> nn.Module:
            return model.get_submodule(name.removesuffix(".weight"))

        self.outs = [module(b.parts["attn.o"].name) for b in anatomy.blocks]
        self.downs = [module(b.parts["ffn.down"].name) for b in anatomy.blocks]
        self.norms = [module(p.name) for p in anatomy if p.role in ("norm.attn", "norm.ffn", "norm.final")]
        self.embedding = model.get_input_embeddings()

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        self.seed = seed
        for gates in model.constraint.parts.values():
            gates.seed = seed

    def prepare(self, rows: TokenRows) -> TokenRows:
        if self.knobs.how != "learnt":
            found = scores(self.knobs.how, self.model, Anatomy(self._stock()), rows, self.keep, self.seed)
            self.chosen = {n: _best(found[n], k).float().to(self.model.device) for n, k in self.keep.items()}
        return rows

    def _stock(self) -> Any:
        with torch.device("meta"):
            return type(self.model)._from_config(self.model.config)

    # ---- one pass
    def enter(self, parts: nn.Module, training: bool) -> None:
        if self.chosen:
            self.z = self.chosen
        elif training:
            self.z = {n: g(self.step) for n, g in parts.items()}  # type: ignore[operator]
        else:
            self.z = self.settle(parts, final=self.step >= self.steps)
        if not training and "layers" in self.z:
            self.kept_layers = self.z["layers"].nonzero().flatten().tolist()

    def settle(self, parts: nn.Module, final: bool) -> dict[str, Tensor]:
        """Gates without noise; the least likely are 0: as many as the shape asks for, or as are expected."""
        if self.chosen:
            return self.chosen
        found = {}
        for n, gates in parts.items():  # type: ignore[operator]
            a = gates.log_alpha.detach()
            counts = torch.full(a.shape[:-1], self.keep[n]) if final else open_probability(a).sum(-1).round().clamp(min=1)
            found[n] = torch.where(keep_largest(a, counts), settled(a, 0.8 / BETA).clamp(min=_LEAST), 0.0)
        return found

    def _gate(self, layer: int, kind: str) -> Any:
        """Before o_proj or down_proj: the gates of heads or neurons."""
        repeat = self.shape.queries * self.shape.head_dim if kind == "heads" else 1
        return lambda module, args: args[0] * self.z[kind][layer].repeat_interleave(repeat).to(args[0].dtype)

    def _write(self, layer: int) -> Any:
        """After o_proj or down_proj: the gates of the block and of the stream."""

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            for factor in ([self.z["layers"][layer]] if "layers" in self.z else []) + ([self.z["hidden"]] if "hidden" in self.z else []):
                output = output * factor.to(output.dtype)
            return output

        return hook

    def _share(self) -> Tensor:
        return (self.z["hidden"] != 0).float().mean().sqrt()

    def terms(self) -> list[LossTerm]:
        keep, handles = self.keep, self._handles
        for kind, modules in (("heads", self.outs), ("ffn", self.downs)):
            for i, m in enumerate(modules):
                if kind in keep:
                    handles.append(m.register_forward_pre_hook(self._gate(i, kind)))
                if "layers" in keep or "hidden" in keep:
                    handles.append(m.register_forward_hook(self._write(i)))
        if "hidden" in keep:
            handles.append(self.embedding.register_forward_hook(lambda m, a, out: out * self.z["hidden"].to(out.dtype)))
            for m in self.norms:  # the mean of squares is over the dimensions that are there
                handles.append(m.register_forward_pre_hook(lambda m, a: (a[0] / self._share().to(a[0].dtype), *a[1:])))
                handles.append(m.register_forward_hook(lambda m, a, out: out * (self._share() * self.z["hidden"]).to(out.dtype)))
        return super().terms()

    # ---- the constraint
    def aims(self, parts: nn.Module) -> dict[str, Goal]:
        return {n: Goal(k / getattr(self.shape, n), 1.0) for n, k in self.keep.items()}

    def values(self, parts: nn.Module) -> dict[str, Tensor]:
        return {n: g.active().mean(-1) for n, g in parts.items()}  # type: ignore[operator]

    def penalty(self) -> Tensor:
        if not self.chosen:
            return super().penalty()
        self.measured = {n: float((z != 0).float().mean()) for n, z in self.chosen.items()}
        return torch.stack([0 * p.sum() for p in self.model.constraint.parameters()]).sum()

    def leave(self, parts: nn.Module) -> None:
        for g in parts.values():  # type: ignore[operator]
            g.limit(_MOST)

    # ---- what is left
    def liveness(self, moved: dict[str, Tensor]) -> str:
        return Technique.liveness(self, moved) if self.chosen else super().liveness(moved)

    def facts(self) -> dict[str, Any]:
        layers = {"kept blocks": self.kept_layers} if "layers" in self.keep else {}
        told = super().facts() | {"how": self.knobs.how} | layers
        if any(abs(v - told["wanted"][n]) * getattr(self.shape, n) > 1 for n, v in told["reached"].items()):  # by more than a unit
            told["cut early"] = "the gates had not reached the shape when it was cut: train longer, or raise multiplier_lr"
        return told

    def export(self, model: Any, folder: Any) -> Any:
        gates = self.settle(detach(model), final=True)
        return smaller(model, gates)


def _best(values: Tensor, keep: int) -> Tensor:
    return keep_largest(values, torch.full(values.shape[:-1], keep))


METHOD = Shear
