"""In which type weights are held and computed, and what rounding does to an update.

Weights that train are held in fp32 whatever is on disk: a step of 1e-5 relative is lost in bf16, whose numbers lie 4e-3 apart. Where the
device has bf16, products run in it under autocast; elsewhere everything is fp32. Frozen weights stay as stored under autocast.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.train import dist

_SAMPLE = 4096  # weights of a tensor that are looked at, at most
_HALF = (torch.float16, torch.bfloat16)


def autocasts() -> bool:
    """Whether products run in bf16 under autocast here."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load_type(train: Train, types: set[torch.dtype]) -> torch.dtype | None:
    """The type to load a checkpoint in; None: as stored."""
    if train.weights == "stored" and len(types & {*_HALF, torch.float32}) > 1:
        raise UserError(
            "the checkpoint holds weights of several types", ", ".join(sorted(map(str, types))), "use train.weights: fp32, or convert it"
        )
    return None if train.weights == "stored" or (autocasts() and len(types) == 1) else torch.float32


def hold(model: nn.Module, train: Train) -> None:
    """Cast what trains to fp32 (without autocast everything), or refuse what cannot train as it is stored."""
    if train.weights == "fp32":
        if getattr(model, "is_quantized", False):
            return
        everything = not autocasts()
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.dtype in _HALF and (p.requires_grad or everything):
                    with torch.no_grad():
                        p.data = p.data.float()
            for name, b in module.named_buffers(recurse=False):
                if b is not None and b.dtype in _HALF and everything:
                    setattr(module, name, b.float())
        return
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in types:
        raise UserError(
            "fp16 weights cannot train as they are stored", "an update is soon too large or too small for them", "use train.weights: fp32"
        )
    if train.rounding == "stochastic" and types & {torch.float32}:
        raise UserError("rounding=stochastic does nothing for fp32 weights", "they are not rounded", "leave it out")


class Rounding:
    """What share of the trained weights a step could not move although they had a gradient, from a sample of each tensor."""

    def __init__(self, model: nn.Module):
        self.before = {n: self._sample(p).clone() for n, p in model.named_parameters() if p.requires_grad and p.dtype in _HALF}
        self.pushed = dict.fromkeys(self.before, torch.zeros(0, dtype=torch.bool))

    @staticmethod
    def _sample(p: Tensor) -> Tensor:
        flat = dist.local(p.detach()).flatten()
        return flat[:: max(1, len(flat) // _SAMPLE)]

    def gradients(self, model: nn.Module) -> None:
        """Remember which weights have a gradient; called before the step."""
        for n, p in model.named_parameters():
            if n in self.before and p.grad is not None:
                self.pushed[n] = self._sample(p.grad) != 0

    def stuck(self, model: nn.Module) -> float | None:
        """Share that had a gradient and did not move; None where nothing is held in 16 bits."""
        if not self.before:
            return None
        held = pushed = 0
        for n, p in model.named_parameters():
            if n in self.before and len(self.pushed[n]):
                held += int(((self._sample(p) == self.before[n]) & self.pushed[n]).sum())
                pushed += int(self.pushed[n].sum())
        held_all, pushed_all = dist.sum_over_ranks(torch.tensor(float(held)), torch.tensor(float(pushed)))
        return float(held_all) / max(float(pushed_all), 1.0)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) for weights that are held in bf16: computed in fp32, rounded up or down by chance in proportion to the distance,
    so that small steps arrive on average. `states` is the type of the moments. Draws follow from the seed and the step alone."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int, states: torch.dtype):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.states, self.stochastic = seed, states, True

    def load_state_dict(self, state_dict: Any) -> None:
        """Moments keep their own type; torch would cast them to that of the weights."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device if value.dim() else "cpu").clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                w, g, state = dist.local(p), dist.local(p.grad).float(), self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(w, dtype=self.states) for _ in range(2))
                state["step"] += 1
                m, v, t = dist.local(state["exp_avg"]), dist.local(state["exp_avg_sq"]), int(state["step"])
                first, second = m.float().lerp_(g, 1 - b1), v.float().lerp_(g * g, 1 - b2)
                m.copy_(first)
                v.copy_(second)
                new = w.float() * (1 - lr * group["weight_decay"])
                new -= lr / (1 - b1**t) * first / ((second / (1 - b2**t)).sqrt_() + group["eps"])
                w.copy_(self._rounded(new, w.dtype, number, t))

    def _rounded(self, new: Tensor, kind: torch.dtype, number: int, step: int) -> Tensor:
        if kind != torch.bfloat16 or not self.stochastic:
            return new.to(kind)
        rng = torch.Generator(new.device).manual_seed((self.seed * 1_000_003 + step) * 10_007 + number + 7_919 * dist.rank())
        noise = torch.randint(0, 1 << 16, new.shape, generator=rng, device=new.device, dtype=torch.int32)
        bits = new.view(torch.int32) + noise  # the lower 16 bits are cut off next
        return (bits & -65536).view(torch.float32).to(kind)


def optimizer_name(name: str) -> str:
    """transformers' name of an optimizer."""
    known = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "sgd": "sgd", "adafactor": "adafactor"}
    name = known.get(name, name)
    from transformers.training_args import OptimizerNames

    if name not in {o.value for o in OptimizerNames}:
        from modelwright.core.errors import did_you_mean

        raise UserError(f"unknown optimizer '{name}'", how=did_you_mean(name, [*known, *(o.value for o in OptimizerNames)]))
    if "bnb" in name or "8bit" in name:
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            raise UserError(f"the optimizer {name} needs bitsandbytes", "it is not installed", "pip install 'modelwright[gpu]'")
    return name


def lost_in_rounding(model: nn.Module, types: dict[str, torch.dtype], before: dict[str, Tensor]) -> float | None:
    """Share of the trained weights (of a sample) that are equal to the source's once they are saved in its type."""
    same = total = 0
    for n, p in model.named_parameters():
        if n in before and types.get(n, p.dtype) in _HALF:
            a = Rounding._sample(p).to(types[n])
            same += int((a == before[n].to(types[n])).sum())
            total += a.numel()
    return same / total if total else None


def is_finite(value: float) -> bool:
    return math.isfinite(value)
