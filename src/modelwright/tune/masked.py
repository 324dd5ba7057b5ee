"""Train a model that was grown by masks: new units and blocks are hidden at first and opened little by little (MSG, arXiv 2305.02869).

When to use it: after `reshape.grow: {operator: masked}`. New parts are random, so they learn features of their own, and hidden, so the
loss begins where the small model's ended. Each kind of part has a mask m that rises from 0 to 1 in `ramp` steps, one kind after another:
feed-forward neurons, the residual stream, heads, then whole blocks:

    neurons, heads    x -> x * mask before the output projection, the mask being m for new units and 1 for old ones
    stream            norm(x * mask / s) * s with s^2 = mean(mask), so that the norm's mean is that of the units that count
    block             m * block(x) + (1 - m) * x

At m = 0 the model is the small one; at m = 1 it is the plain stock model, which is what is saved: a run that is too short to open all
masks is refused. The official code (of the paper; 5000 steps a ramp) keeps the masks as buffers of its own model class.
Ours: hooks on any model that reshape.grow makes; division by s before the norm as well, so that its epsilon counts as before.
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
from modelwright.core.model.anatomy import Anatomy, Part
from modelwright.core.train.loop import steps_for
from modelwright.core.train.technique import Named, Technique


@dataclass(frozen=True)
class Knobs(Tune):
    ramp: int = knob(5000, "steps in which each kind of part is opened", low=1)


class Masked(Technique):
    """Masks as hooks, opened after each step and gone in what is saved."""

    name = "masked"
    supports = Technique.supports - {"lora", "fsdp2", "zero0", "zero1", "zero2", "zero3"}

    def __init__(self, knobs: Knobs):
        self.knobs, self.step = knobs, 0
        self.kinds: list[str] = []  # in the order in which they open
        self._handles: list[Any] = []

    def settings(self, rows: TokenRows, train: Train) -> Train:
        self._steps = steps_for(rows, train)
        return train

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        config = anatomy.config
        old, blocks = getattr(config, "grown_from", None) or {}, getattr(config, "grown_blocks", None) or []
        down = anatomy.blocks[0].parts.get("ffn.down")
        width = {"hidden": config.hidden_size, "heads": config.num_attention_heads, "ffn": _inputs(down) if down else 0}
        self.kinds = [k for k in ("ffn", "hidden", "heads") if old.get(k, width[k]) < width[k]] + ["blocks"] * bool(blocks)
        if not self.kinds:
            raise UserError("there is nothing to open", "the model was not grown by masks", "grow it with reshape.grow, operator=masked")
        need = self.knobs.ramp * len(self.kinds)
        if (steps := getattr(self, "_steps", need)) < need:
            raise UserError(
                f"the run has {steps} steps and the masks need {need}",
                f"each of {', '.join(self.kinds)} opens in {self.knobs.ramp} steps",
                "train longer, or lower ramp",
            )
        for b in anatomy.blocks:
            if "ffn" in self.kinds:
                self._before(_owner(model, b.parts["ffn.down"]), self._mask("ffn", old["ffn"]))
            if "heads" in self.kinds:
                o = b.parts["attn.o"]
                self._before(_owner(model, o), self._mask("heads", old["heads"] * _inputs(o) // width["heads"]))
            if b.index in blocks:
                self._handles.append(b.module.register_forward_hook(self._blend, with_kwargs=True))
        if "hidden" in self.kinds:
            for part in anatomy:
                if part.role in ("norm.attn", "norm.ffn", "norm.final") and part.kind == "weight":
                    self._norm(_owner(model, part), old["hidden"])
        return model

    def open(self, kind: str) -> float:
        """m of a kind of part, from 0 to 1."""
        return min(1.0, max(0.0, self.step / self.knobs.ramp - self.kinds.index(kind)))

    def _mask(self, kind: str, old: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([x[..., :old], x[..., old:] * self.open(kind)], -1)

    def _before(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:])))

    def _norm(self, module: nn.Module, old: int) -> None:
        def size(x: Tensor) -> float:
            return ((old + (x.shape[-1] - old) * self.open("hidden")) / x.shape[-1]) ** 0.5

        mask = self._mask("hidden", old)
        self._before(module, lambda x: mask(x) / size(x))
        self._handles.append(module.register_forward_hook(lambda _, args, out: out * size(out)))

    def _blend(self, _: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x, m = args[0] if args else kwargs["hidden_states"], self.open("blocks")
        y = out[0] if isinstance(out, tuple) else out
        y = m * y + (1 - m) * x
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def after_step(self, named: Named) -> None:
        self.step += 1

    def facts(self) -> dict[str, Any]:
        return {k: self.open(k) for k in self.kinds}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def export(self, model: Any, folder: Path) -> Any:
        if closed := [k for k in self.kinds if self.open(k) < 1]:
            raise UserError(f"{', '.join(closed)} are still masked", "the run was too short", "train longer, or lower ramp")
        self.remove()
        for name in ("grown_from", "grown_blocks"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        return model

    def remove(self) -> None:
        """Take the masks away."""
        for h in self._handles:
            h.remove()
        self._handles = []


def _inputs(part: Part) -> int:
    """The width of what a matrix reads."""
    return part.shape[0] if part.orientation == "in_out" else part.shape[1]


def _owner(model: Any, part: Part) -> nn.Module:
    return model.get_submodule(part.name.rpartition(".")[0])


METHOD = Masked
