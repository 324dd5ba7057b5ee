"""SpIEL: sparse differences to the weights, a few entries anywhere, dropped and grown while training (arXiv 2401.16405).

For tuning with the memory of LoRA and a result that merges into plain weights. Of each linear matrix k entries may move:
    W' = W + scatter(values at indices),     values 0 at the start, so that step 0 is the base model exactly.
In every `reselect` steps the int(k p) smallest |values| are dropped and as many other entries grown, with p = 1 at first and then
p = rate (1 - t / T), or by a cosine. Two ways to grow:
    ag: over `window` steps the gradients of the k candidates with the largest |gradient| are summed; the largest |sum| are grown.
        A grown entry begins with moments from these gradients, and AdamW corrects its bias by the age of each entry.
    ma: SM3 keeps a sum r per row and c per column; entries with the largest r c are grown.
Weight decay acts on the values: it pulls towards the pre-trained weights. The budget is a share of all parameters (density), a number
of entries (tunable), or as many parameters as LoRA of a rank would have (rank), shared out by the size of the matrices.

The official code chooses candidates from the first forward pass of a window (candidates: pass), seeds moments from passes that are
smaller than steps, opens later windows one step early (legacy_window), does not advance the age in bf16 and runs in one process. Ours:
candidates come from the gradient of the window's whole first step (candidates: step), summed over passes and processes, so that neither
changes the result; one dense gradient of each matrix is held during that step where there are several passes. growth: none is the
control, a fixed random mask. Stacked experts are not adapted. The result is saved merged, and beside it as a `shira` adapter that PEFT
loads, padded with zeros to the size that PEFT expects, where all layers are nn.Linear and it fits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy, Part
from modelwright.core.train import dist
from modelwright.core.train.technique import Named, Technique
from modelwright.tune.sparse.layer import VALUES, Delta, attach, largest, merge
from modelwright.tune.sparse.rules import adam, replaced, seeds, share, sm3
from modelwright.tune.sparse.shira import adapter_rank, save_adapter


@dataclass(frozen=True)
class Knobs(Tune):
    density: float = knob(0.01, "entries as a share of all parameters of the model", low=0, high=1)
    tunable: int | None = knob(None, "number of entries, instead of density", low=1)
    rank: int | None = knob(None, "as many entries as LoRA of this rank has parameters, instead of density", low=1)
    roles: list[str] = knob([], "roles of the matrices; empty: all linear ones of the blocks")
    growth: Literal["ag", "ma", "none"] = knob("ag", "accumulated gradients, SM3 moments, or a fixed random mask")
    reselect: int = knob(20, "S: steps from one reselection to the next", low=1)
    window: int = knob(5, "gamma: steps over which gradients are collected before a reselection", low=1)
    rate: float = knob(0.2, "p of the second reselection at most", low=0, high=1)
    decay: Literal["linear", "cosine"] = knob("linear", "how p falls to 0; linear begins with a reselection of all entries")
    candidates: Literal["step", "pass"] = knob("step", "gradient that candidates are chosen from: a whole step's, or the first pass's")
    legacy_window: bool = knob(False, "later windows have one step more, as in the official code")
    eps: float = knob(1e-6, "epsilon of AdamW", low=0)


BETAS = (0.9, 0.999)


def targets(anatomy: Anatomy, roles: list[str]) -> list[Part]:
    """The matrices that get entries. UserError for a role that the model does not have."""
    linear = [p for p in anatomy if p.kind == "weight" and p.orientation in ("out_in", "in_out") and not p.tied and p.layer is not None]
    if not roles:
        found = [p for p in linear if p.role.startswith(("attn.", "cross.", "ffn.", "shared.")) and p.role != "shared.router"]
    else:
        known = {p.role for p in linear}
        if unknown := [r for r in roles if r not in known]:
            name = type(anatomy.model).__name__
            raise UserError(f"roles has '{unknown[0]}'", f"{name} has no such linear matrix", did_you_mean(unknown[0], known))
        found = [p for p in linear if p.role in roles]
    if not found:
        raise UserError(
            f"spiel finds no matrix in {type(anatomy.model).__name__}", "it has no linear layers in its blocks", "use tune.full"
        )
    return found


def budget(anatomy: Anatomy, parts: list[Part], knobs: Knobs) -> list[int]:
    """Entries of each matrix: the whole number shared out by size, rounded down."""
    total = knobs.tunable or int(knobs.density * sum(p.size for p in anatomy))
    if knobs.rank:
        total = knobs.rank * sum(sum(p.shape) for p in parts)
    size = sum(p.size for p in parts)
    found = [min(total * p.size // size, p.size) for p in parts]
    if not any(found):
        raise UserError(f"{total} entries are too few for {len(parts)} matrices", "none gets one", "raise density, tunable or rank")
    return found


class Spiel(Technique):
    """An attachment with an optimizer and a selection of its own."""

    name = "spiel"
    adapters = True
    supports = Technique.supports - {"lora"}

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        if knobs.density == 0:
            raise UserError("density is 0", "no entry would move", "give a share above 0")
        if knobs.tunable and knobs.rank:
            raise UserError("tunable and rank are both given", "each is the number of entries", "leave one out")
        if knobs.window > knobs.reselect:
            raise UserError(f"window={knobs.window} is longer than reselect={knobs.reselect}", "windows would overlap", "shorten it")
        if knobs.candidates == "pass" and dist.world() > 1:
            raise UserError("candidates: pass works in one process", "each process sees another pass", "set candidates: step")
        self.deltas: dict[str, Delta] = {}  # by the path of the layer
        self.state: dict[str, dict[str, Tensor]] = {}
        self.t, self._replaced, self._direct, self._hook = 0, 0, knobs.candidates == "pass", None
        self._now: dict[str, Tensor] = {}  # gradient of the candidates in this step
        self._norm = 0.0

    # ---- attachment and selection ----------------------------------------------------------------------------------
    def settings(self, rows: TokenRows, train: Train) -> Train:
        if train.optimizer != "adamw":
            raise UserError(f"spiel does not train with {train.optimizer}", "it has optimizers of its own", "leave train.optimizer out")
        self._direct = self.knobs.candidates == "pass" or (train.accumulate == 1 and dist.world() == 1)
        return train

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        parts = targets(anatomy, self.knobs.roles)
        self._experts = bool(anatomy.experts)
        counts = budget(anatomy, parts, self.knobs)
        for part, k in zip(parts, counts, strict=True):
            if k:
                path = part.name.removesuffix(".weight")
                self.deltas[path] = Delta((part.shape[0], part.shape[1]), torch.arange(k))
                attach(model.get_submodule(path), self.deltas[path])
        _freeze(model)
        linear = all(p.orientation == "out_in" for p in parts)
        self._rank = adapter_rank(self.deltas.values()) if linear else 0
        return model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for delta in self.deltas.values():
            kind = torch.int32 if delta.numel < 2**31 else torch.int64
            delta.indices = torch.randperm(delta.numel, generator=rng)[: len(delta.indices)].sort().values.to(kind)
        _freeze(model)  # what another method attached since is frozen too

    # ---- one step --------------------------------------------------------------------------------------------------
    def collects(self, t: int) -> bool:
        """Whether step t, from 1, is in a window."""
        k = self.knobs
        return k.growth == "ag" and ((t - 1) % k.reselect < k.window or (k.legacy_window and t % k.reselect == 0))

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        open_ = self.collects(self.t + 1)
        for delta in self.deltas.values():
            delta.collect, delta.at_once = open_, self._direct

    def on_gradients(self, named: Named) -> None:
        if self._hook is None:
            self._hook = self.optimizer.register_step_pre_hook(lambda optimizer, *_: self._step(optimizer))
        self._params = {n.removesuffix("." + VALUES): p for n, p in named if n.endswith(VALUES)}
        self._norm = self._length()
        self._now = {}
        for path, delta in self.deltas.items():
            if not delta.collect:
                continue
            if delta.candidates is None and delta.dense is not None:
                dense = dist.all_sum(delta.dense)
                delta.candidates = largest(dense.abs(), len(delta.indices))
                delta.passes, delta.dense = dense[delta.candidates] / dist.world(), None
            elif delta.passes is not None:
                delta.passes = dist.all_sum(delta.passes) / dist.world()
            if delta.passes is not None:
                self._now[path], delta.passes = delta.passes, None
            delta.collect = False

    def _length(self) -> float:
        """Norm of the gradient of all values."""
        squares = torch.stack([dist.local(p.grad).double().square().sum().cpu() for p in self._params.values() if p.grad is not None])
        return float(dist.sum_over_ranks(squares.sum())[0]) ** 0.5

    @torch.no_grad()
    def _step(self, optimizer: Any) -> None:
        """The optimizer's step on all values, in its place; the others' gradients are left to it."""
        clipped = self._length() / self._norm if self._norm else 1.0
        rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        self.t += 1
        for path, p in self._params.items():
            if p.grad is None:
                continue
            values, grad, delta = _whole(p).float(), _whole(p.grad).float(), self.deltas[path]
            state, (lr, decay) = self._state_of(path, values), rates[id(p)]
            if self.knobs.growth == "ma":
                places = delta.places(values.device).long()
                new = sm3(values, grad, state, lr, decay, places // delta.shape[1], places % delta.shape[1])
            else:
                new = adam(values, grad, state, lr, decay, BETAS, self.knobs.eps)
            dist.local(p).copy_(dist.rows_of(p, new))
            p.grad = None
            if path in self._now:
                now = self._now[path] * clipped  # as the gradient of the active entries
                for name, more in (("sum", now), ("squares", now * now)):
                    state[name] = state[name] + more if name in state else more
                state["count"] = state.get("count", torch.zeros(())) + 1

    def _state_of(self, path: str, values: Tensor) -> dict[str, Tensor]:
        if path not in self.state:
            r, c = self.deltas[path].shape
            names = {"r": r, "c": c} if self.knobs.growth == "ma" else dict.fromkeys(("m", "v", "age"), len(values))
            self.state[path] = {n: torch.zeros(size, device=values.device) for n, size in names.items()}
        return self.state[path]

    @torch.no_grad()
    def after_step(self, named: Named) -> None:
        k = self.knobs
        if k.growth == "none" or self.t < k.window or (self.t - k.window) % k.reselect or self.t > self.steps:
            return
        p = share(self.t, self.steps, k.rate, k.decay, self.t == k.window)
        for path, param in self._params.items():
            self._reselect(path, param, p)

    def _reselect(self, path: str, param: nn.Parameter, p: float) -> None:
        delta, values, state = self.deltas[path], _whole(param).float(), self.state[path]
        n, indices = int(len(values) * p), delta.places(values.device).long()
        if self.knobs.growth == "ag":
            count = int(state.pop("count"))
            total, squares, candidates = state.pop("sum"), state.pop("squares"), delta.candidates
            assert candidates is not None
            delta.candidates = None
            slots, new = replaced(values, indices, n, candidates, total.abs())
            for name, t in seeds(total[new], squares[new], count, BETAS).items():
                state[name][slots] = t
        else:
            candidates = torch.arange(delta.numel, device=values.device)
            slots, new = replaced(values, indices, n, candidates, torch.outer(state["r"], state["c"]).flatten())
        values[slots] = 0
        delta.indices = indices.index_put_((slots,), candidates[new]).to(delta.indices.dtype)
        dist.local(param).copy_(dist.rows_of(param, values))
        self._replaced += len(slots)

    # ---- what is told, kept and saved --------------------------------------------------------------------------------
    def liveness(self, moved: dict[str, Tensor]) -> str:
        base = [n for n, m in moved.items() if not n.endswith(VALUES) and bool(m.any())]
        free = [m for n, m in moved.items() if n.endswith(VALUES)]
        count = sum(int(m.sum()) for m in free)
        if base or not count:
            raise RuntimeError(f"spiel: {count} entries moved and {len(base)} frozen tensors did")
        return f"spiel: {count} of {sum(map(len, free))} entries of {len(free)} matrices moved, no frozen tensor did"

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "entries": sum(len(d.indices) for d in self.deltas.values()),
            "replaced": self._replaced,
            "growth": self.knobs.growth,
        }
        found["adapter"] = f"shira, r {self._rank}" if self._rank else "none: PEFT's shira does not hold these matrices"
        return found | ({"experts": "not adapted"} if self._experts else {})

    def state_dict(self) -> dict[str, Any]:
        deltas = {n: {"indices": d.indices, "candidates": d.candidates} for n, d in self.deltas.items()}
        return {"t": self.t, "replaced": self._replaced, "deltas": deltas, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self._replaced, self.state = state["t"], state["replaced"], state["state"]
        for name, kept in state["deltas"].items():
            self.deltas[name].indices, self.deltas[name].candidates = kept["indices"], kept["candidates"]

    def export(self, model: Any, folder: Path) -> Any:
        layers: Iterable[tuple[str, Any]] = [(path, model.get_submodule(path)) for path in self.deltas]
        if self._rank:
            entries = {path: (self.deltas[path], getattr(layer, VALUES).detach()) for path, layer in layers}
            save_adapter(folder / "adapter", entries, self._rank, model)
        for path, layer in layers:
            merge(layer, self.deltas[path])
        return model


def _freeze(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not name.endswith(VALUES):
            p.requires_grad_(False)


def _whole(t: Any) -> Tensor:
    """A sharded vector put together; a copy."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone()


METHOD = Spiel
