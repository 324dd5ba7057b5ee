"""MIGU: in each step only the output units that fire strongly may move (arXiv 2406.17245, EMNLP 2024 Findings).

For y = x W and the tokens of a step, n_i = mean |y_i|; the floor(T d_out) units with the smallest n are masked and
    W <- W - eta (M o grad W),   M_i = 1 for the rest, broadcast over the inputs.     T = 0.7: 30 % of the rows move.
Biases, norms and embeddings are not masked. With LoRA, A is masked by its own output, B by the layer's combined output
x W + (alpha / r) x A B. Of a sequence of tasks the first is trained without masks.

The official code: quantile(n, T) with ties kept, which keeps one row more or less (compat=official); padding counted
(include_padding); every nn.Linear, the head included (head); its LoRA path does not run; with DeepSpeed ZeRO-2 the method
silently does nothing. Ours: padding excluded, one all-reduce a step, each piece of a fused projection ranked by itself.

Masking a gradient does not stop Adam: its momentum moves masked rows. guard=grad is the paper's; guard=update puts the
masked rows back after the step. The leak (share of |movement| that falls in masked rows) is measured and reported.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy, Part
from modelwright.core.train import dist
from modelwright.core.train.freeze import units
from modelwright.core.train.technique import Named, Technique, plain_name
from modelwright.moe.lora import LoraMoeLinear


@dataclass(frozen=True)
class Knobs(Tune):
    threshold: float = knob(0.7, "T: masked share of the output units", low=0, high=1)
    guard: Literal["grad", "update"] = knob("grad", "mask the gradient only, or also put masked rows back after the step")
    rows: Literal["magnitude", "random"] = knob("magnitude", "which rows move: the loudest, or as many drawn anew each step (the control)")
    layers: Literal["all", "attention", "ffn"] = knob("all", "which linear layers are masked")
    head: bool = knob(False, "mask the language-model head too")
    include_padding: bool = knob(False, "count padding tokens, as the official code does")
    mask_first: bool = knob(False, "mask during the first task of a sequence too")
    compat: Literal["paper", "official"] = knob("paper", "exact count of masked rows, or the official quantile")
    leak_every: int = knob(10, "steps between measurements of the leak; 0: never", low=0)


@dataclass
class Target:
    """One masked weight: the layer whose output ranks its units, and the groups of units that are ranked together."""

    layer: nn.Module
    weight: str
    units: int
    groups: list[Tensor]
    across: bool  # stored (in, out)


class Migu(Technique):
    """Observes the outputs of each forward pass; masks gradients once per step."""

    name = "migu"
    supports = Technique.supports | {"4bit"}

    def __init__(self, knobs: Knobs):
        self.knobs, self.steps, self.leaked, self.movement = knobs, 0, 0.0, 0.0
        self.masks: dict[str, Tensor] = {}  # plain name -> which units may move
        self._real: dict[str, Tensor] = {}  # which tokens of the batch count, flat; of a decoder with an encoder too
        self.whole_logits = knobs.head
        self._count = torch.zeros((), dtype=torch.float64)
        self._kept: dict[int, Tensor] = {}  # by id of the parameter

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        wanted = {"all": ("attn.", "cross.", "ffn.", "shared."), "attention": ("attn.", "cross."), "ffn": ("ffn.", "shared.")}[
            self.knobs.layers
        ]
        wanted += ("head",) if self.knobs.head else ()
        if self.knobs.layers != "attention" and anatomy.experts:
            raise UserError(
                f"migu cannot mask the experts of {type(anatomy.model).__name__}",
                "all experts are one tensor and no layer has the output of one of them",
                "set layers: attention",
            )
        if any(isinstance(m, LoraMoeLinear) for m in model.modules()):
            raise UserError(
                "migu cannot mask LoRAMoE's experts", "no layer has the output of one of them", "tune with one of the two, or merge first"
            )
        self.seed, self.targets = seed, self._targets(model, anatomy, wanted)
        across = {p.name for p in anatomy if p.role in ("cross.k", "cross.v")}  # of a decoder, but they see the encoder's tokens
        self._decoder = ["decoder." in t.weight and t.weight not in across for t in self.targets]
        self._sums = [torch.zeros(t.units) for t in self.targets]
        self._seen: set[int] = set()
        self._handles = [t.layer.register_forward_hook(self._watch(i)) for i, t in enumerate(self.targets)]

    def _targets(self, model: Any, anatomy: Anatomy, wanted: tuple[str, ...]) -> list[Target]:
        matrices = [p for p in anatomy if p.kind == "weight" and len(p.shape) == 2]
        parts = {p.name.removesuffix(".weight"): p for p in matrices if p.role.startswith(wanted)}
        if "head" in wanted:  # a tied head is the embedding under another name
            parts |= {n.removesuffix(".weight"): p for p in matrices if p.role == "embed" for n in p.tied if "embed" not in n}
        found = []
        for path, layer in model.named_modules():
            part = parts.get(plain_name(path + ".weight").removesuffix(".weight"))
            if part is None or path.endswith(".base_layer"):
                continue
            if not hasattr(layer, "lora_A"):
                if layer.weight.requires_grad:
                    found.append(Target(layer, part.name, _out(part), _groups(part), part.orientation == "in_out"))
                continue
            for name, a in layer.lora_A.items():
                found.append(Target(a, plain_name(f"{path}.lora_A.{name}.weight"), a.out_features, [torch.arange(a.out_features)], False))
                found.append(Target(layer, plain_name(f"{path}.lora_B.{name}.weight"), _out(part), _groups(part), False))
        if not found:
            raise UserError(
                "migu finds nothing to mask", "no trained weight belongs to a linear layer of the chosen kind", "set layers: all"
            )
        return found

    def _watch(self, i: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self._real or i in self._seen:  # not training, or recomputed for the backward pass
                return
            self._seen.add(i)
            with torch.no_grad():
                of = "decoder" if self._decoder[i] else "real"
                real = self._real.get(of, self._real["real"])
                fired = real @ output.detach().flatten(0, -2).abs().float()
                self._sums[i] = self._sums[i].to(output.device) + fired

        return hook

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        if self.first_task and not self.knobs.mask_first:
            return
        real = torch.ones_like(batch["real"]) if self.knobs.include_padding else batch["real"]
        self._real, self._seen = {"real": real.flatten().float()}, set()
        if "decoder_real" in batch:
            self._real["decoder"] = (
                (torch.ones_like if self.knobs.include_padding else torch.clone)(batch["decoder_real"]).flatten().float()
            )
        self._count += float(real.sum())

    def _choose(self) -> None:
        """Masks of this step from the sums over its window and all processes: one collective."""
        flat = dist.all_sum(torch.cat([*(s.double() for s in self._sums), self._count.to(self._sums[0].device)[None]]))
        *sums, count = flat.split([*(t.units for t in self.targets), 1])
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + self.steps)
        for target, total in zip(self.targets, sums, strict=True):
            n = total / count if self.knobs.rows == "magnitude" else torch.rand(target.units, generator=rng).to(total)
            keep = torch.zeros(target.units, dtype=torch.bool, device=n.device)
            for group in target.groups:
                group = group.to(n.device)
                keep[group] = kept(n[group], self.knobs.threshold, self.knobs.compat)
            self.masks[target.weight] = keep

    def on_gradients(self, named: Named) -> None:
        self.steps += 1
        if not self._real:
            return
        self._choose()
        self._real, self._count = {}, torch.zeros((), dtype=torch.float64)
        self._sums = [torch.zeros_like(s) for s in self._sums]
        measure = self.knobs.leak_every and self.steps % self.knobs.leak_every == 0
        for p, mask, across in self._masked(named):
            dist.local(p.grad).index_fill_(int(across), (~mask).nonzero().flatten(), 0)
            if measure or self.knobs.guard == "update":
                self._kept[id(p)] = dist.local(p.detach()).clone()

    def after_step(self, named: Named) -> None:
        if not self._kept:
            return
        with torch.no_grad():
            leaked, movement = torch.zeros(()), torch.zeros(())
            for p, mask, across in self._masked(named):
                weight, old, m = dist.local(p), self._kept[id(p)], mask if across else mask[:, None]
                if self.knobs.guard == "update":
                    weight.copy_(torch.where(m, weight, old))
                if self.knobs.leak_every and self.steps % self.knobs.leak_every == 0:
                    step = (weight - old).abs()
                    movement, leaked = movement + step.sum().cpu(), leaked + (step * ~m).sum().cpu()
            self._kept = {}
            leaked, movement = dist.sum_over_ranks(leaked, movement)
            self.leaked, self.movement = self.leaked + float(leaked), self.movement + float(movement)

    def _masked(self, named: Named) -> Any:
        across = {t.weight: t.across for t in self.targets}
        for name, p in named:
            if (mask := self.masks.get(name)) is not None and p.grad is not None:
                yield p, mask if across[name] else dist.rows_of(p, mask), across[name]

    def liveness(self, moved: dict[str, Tensor]) -> str:
        if self.first_task and not self.knobs.mask_first:
            return "migu: the first task is trained without masks"
        silent = [
            t.weight
            for t in self.targets
            if t.weight not in self.masks or not bool(self.masks[t.weight].any() or self.knobs.threshold == 1)
        ]
        unseen = [t.weight for i, t in enumerate(self.targets) if i not in self._seen]
        if silent or unseen:
            raise RuntimeError(
                f"migu: the outputs of {len(set(silent + unseen))} of {len(self.targets)} layers were not seen: {(silent + unseen)[0]}"
            )
        free = sum(int((moved[n] & m.to(moved[n].device)).sum()) for n, m in self.masks.items())
        held = sum(int((moved[n] & ~m.to(moved[n].device)).sum()) for n, m in self.masks.items())
        total, keep = sum(m.numel() for m in self.masks.values()), sum(int(m.sum()) for m in self.masks.values())
        if (held and self.knobs.guard == "update") or (not free and keep):
            raise RuntimeError(f"migu: {held} masked and {free} of {keep} free rows moved")
        return f"migu: {total - keep} of {total} rows of {len(self.masks)} matrices masked, {held} of them moved; {free} others moved"

    def facts(self) -> dict[str, Any]:
        for h in self._handles:
            h.remove()
        leak = self.leaked / self.movement if self.movement else None
        return {"masked share": self.knobs.threshold, "guard": self.knobs.guard, "leak": leak}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "leaked": self.leaked, "movement": self.movement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.leaked, self.movement = state["steps"], state["leaked"], state["movement"]


def kept(n: Tensor, threshold: float, compat: str = "paper") -> Tensor:
    """Which units may move, (units,) bool: all but the floor(threshold * units) smallest, or those at the official quantile."""
    if compat == "official":
        return n >= torch.quantile(n, threshold)
    keep = torch.ones(len(n), dtype=torch.bool, device=n.device)
    keep[n.argsort(stable=True)[: int(threshold * len(n) + 1e-9)]] = False
    return keep


def _out(part: Part) -> int:
    return part.shape[1] if part.orientation == "in_out" else part.shape[0]


def _groups(part: Part) -> list[Tensor]:
    return [units(part, [name]).nonzero().flatten() for name in part.rows] or [torch.arange(_out(part))]


METHOD = Migu
