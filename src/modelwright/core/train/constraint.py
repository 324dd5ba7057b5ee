"""Gates that close and quantities that are held to a target while a model trains, for pruning and for the fusion of heads.

Hard-concrete gates (Louizos, Welling and Kingma, 1712.01312), with beta = 2/3, gamma = -0.1 and zeta = 1.1, u uniform in (0, 1):

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)        z = clamp(s (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(log_alpha + beta ln 11)                  P(z = 1) = sigmoid(log_alpha - beta ln 11)

The augmented Lagrangian (Wang et al., 1910.04732; CoFi, 2204.00408; Sheared LLaMA, 2310.06694) holds a value v to a target t:

    max over (lambda1, lambda2)  min over the weights and gates  of  loss + mean(lambda1 (v - t) + lambda2 (v - t)^2)

The target moves from its begin to its end over a share of the steps. The multipliers start at 0. Their gradient is turned round, so that
every optimizer ascends on them, also one that knows no `maximize`.

`Constrained` is the Technique that all this is used through. A method says which modules it adds (`build`), what it holds to what
(`goals`, `values`) and what happens before each forward pass (`enter`). What it adds stands at the top of the model, as
`model.constraint`: there it is whole in memory during a pass and in the loss terms, also under FSDP2. What is drawn follows from the seed
and the step alone, so all micro-batches and processes of a step share it and a resumed run repeats it.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.technique import LossTerm, Named, Technique

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
_OFFSET = BETA * math.log(-ZETA / GAMMA)  # 1.5986
_EDGE = 1e-6  # u keeps this distance from 0 and 1
_TOP = "constraint"


# ---- gates -----------------------------------------------------------------------------------------------------------
def stretch(s: Tensor) -> Tensor:
    """From (0, 1) to (gamma, zeta), cut to [0, 1]."""
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates z in [0, 1] of uniform numbers u of the same shape."""
    u = u.clamp(_EDGE, 1 - _EDGE)
    return stretch(torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA))


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0): its mean is the expected share of units that are in use."""
    return torch.sigmoid(log_alpha + _OFFSET)


def whole_probability(log_alpha: Tensor) -> Tensor:
    """P(z = 1)."""
    return torch.sigmoid(log_alpha - _OFFSET)


def settled(log_alpha: Tensor, sharpness: float = 1.0) -> Tensor:
    """Gates without noise: 0 up to log_alpha = -ln 11 / sharpness, 1 from + ln 11 / sharpness."""
    return stretch(torch.sigmoid(log_alpha * sharpness))


def keep_largest(scores: Tensor, counts: Tensor) -> Tensor:
    """The counts (...) largest of each row of scores (..., n), as bool (..., n); of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, rank < counts[..., None].to(scores.device))


class Gates(nn.Module):
    """Gates of one kind of unit; `stream` keeps the draws of several kinds apart."""

    def __init__(self, shape: tuple[int, ...], begin: float, seed: int, stream: int = 0, spread: float = 0.0):
        super().__init__()
        self.seed, self.stream = seed, stream
        noise = np.random.default_rng((seed, stream)).standard_normal(shape) if spread else 0.0
        self.log_alpha = nn.Parameter(torch.full(shape, begin) + torch.as_tensor(spread * noise, dtype=torch.float32))
        self._drawn: tuple[int, Tensor] | None = None

    def forward(self, step: int) -> Tensor:
        """Gates drawn for an optimizer step."""
        if self._drawn is None or self._drawn[0] != step:
            u = np.random.default_rng((self.seed, self.stream, step + 1)).random(tuple(self.log_alpha.shape), dtype=np.float32)
            self._drawn = step, torch.from_numpy(u).to(self.log_alpha.device)
        return sample(self.log_alpha, self._drawn[1])

    def active(self) -> Tensor:
        """P(z > 0) of each gate."""
        return open_probability(self.log_alpha)

    @torch.no_grad()
    def limit(self, most: float) -> None:
        """Cut log_alpha to [-most, most]."""
        dist.local(self.log_alpha).clamp_(-most, most)


# ---- the constraint --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Goal:
    """A target that moves from `begin` to `end`: linear, or fast at first (cubic: 1 - (1 - x)^3)."""

    end: float
    begin: float = 0.0
    shape: Literal["linear", "cubic"] = "linear"

    def at(self, progress: float) -> float:
        """The target at a share of the way, 0 to 1 and beyond."""
        x = min(max(progress, 0.0), 1.0)
        return self.begin + (self.end - self.begin) * (x if self.shape == "linear" else 1 - (1 - x) ** 3)


class Multipliers(nn.Module):
    """lambda1 and lambda2 of one goal."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, gap: Tensor) -> Tensor:
        """mean(lambda1 gap + lambda2 gap^2); descends on gap and ascends on the multipliers."""
        pull = self.linear.detach() * gap + self.square.detach() * gap**2
        push = self.linear * gap.detach() + self.square * gap.detach() ** 2
        return (pull - (push - push.detach())).mean()


class _Term(LossTerm):
    """The Lagrangian; the mean over the micro-batches of a step."""

    name = "constraint"

    def __init__(self, owner: "Constrained"):
        self.owner = owner

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=batch["real"].device)

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return self.owner.penalty()[None]


class Constrained(Technique):
    """A method that adds modules to a model and holds quantities of them to goals.

    parts_lr and multiplier_lr are the learning rates of what it adds; `warm_up` is the share of the steps over which targets move.
    """

    supports = frozenset({"ddp", "fsdp2", "fused", "gradient_checkpointing"})

    def __init__(self, parts_lr: float, multiplier_lr: float, warm_up: float):
        self.parts_lr, self.multiplier_lr, self.warm_up = parts_lr, multiplier_lr, warm_up
        self.step = 0  # optimizer steps that are done
        self.goals: dict[str, Goal] = {}
        self.measured: dict[str, float] = {}  # each value at the last step, its mean where there are several
        self._handles: list[Any] = []

    # ---- what a method says
    @abstractmethod
    def build(self, model: Any, anatomy: Anatomy) -> nn.Module:
        """The modules to add; called before anything is wrapped."""

    @abstractmethod
    def aims(self, parts: nn.Module) -> dict[str, Goal]:
        """The goals by name."""

    @abstractmethod
    def values(self, parts: nn.Module) -> dict[str, Tensor]:
        """What is held to each goal, with a gradient: one value, or several (n,) that each are held to it."""

    @abstractmethod
    def enter(self, parts: nn.Module, training: bool) -> None:
        """Called at the beginning of each forward pass, to draw gates for example."""

    def leave(self, parts: nn.Module) -> None:
        """Called after each optimizer step; `parts` may be sharded."""

    # ---- how it is trained
    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        parts = self.build(model, anatomy)
        self.goals, self.model = self.aims(parts), model
        multipliers = nn.ModuleDict({name: Multipliers() for name in self.goals})
        model.add_module(_TOP, nn.ModuleDict({"parts": parts, "multipliers": multipliers}).to(model.device))
        return model

    def terms(self) -> list[LossTerm]:
        # The hook comes last: what is copied before the model is sharded has none.
        self._handles.append(self.model.register_forward_pre_hook(self._enter))
        return [_Term(self)]

    def _enter(self, model: nn.Module, args: tuple) -> None:
        self.enter(_top(model)["parts"], model.training)

    def groups(self, named: Named) -> list[dict[str, Any]]:
        own = [(n, p) for n, p in named if n.startswith(f"{_TOP}.") and p.requires_grad]
        first = f"{_TOP}.multipliers."
        return [
            {"params": [p for n, p in own if not n.startswith(first)], "lr": self.parts_lr, "weight_decay": 0.0},
            {"params": [p for n, p in own if n.startswith(first)], "lr": self.multiplier_lr, "weight_decay": 0.0},
        ]

    def target(self, name: str) -> float:
        """A goal's target at this step."""
        return self.goals[name].at(self.step / max(self.warm_up * self.steps, 1))

    def penalty(self) -> Tensor:
        """The Lagrangian of all goals, in the step that is under way."""
        top = _top(self.model)
        values, total = self.values(top["parts"]), torch.zeros((), device=self.model.device)
        for name, value in values.items():
            self.measured[name] = float(value.detach().mean())
            total = total + top["multipliers"][name](value - self.target(name))  # type: ignore[index]
        return total

    def after_step(self, named: Named) -> None:
        self.step += 1
        self.leave(_top(self.model)["parts"])

    def liveness(self, moved: dict[str, Tensor]) -> str:
        held = [n for n, m in moved.items() if n.startswith(f"{_TOP}.parts.") and bool(m.any())]
        if not held:
            raise RuntimeError(f"{self.name}: nothing of what it adds moved in the first step")
        reached = ", ".join(f"{n} {v:.3f} to {self.goals[n].end:.3f}" for n, v in self.measured.items())
        return f"{super().liveness(moved)}; {reached}"

    def facts(self) -> dict[str, Any]:
        for h in self._handles:
            h.remove()
        return {"reached": dict(self.measured), "wanted": {n: g.end for n, g in self.goals.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.measured = state["step"], state["measured"]


def _top(model: nn.Module) -> nn.ModuleDict:
    return model.get_submodule(_TOP)  # type: ignore[return-value]


def detach(model: nn.Module) -> nn.Module:
    """Take what a method added off a trained model, and give it back."""
    parts = _top(model)["parts"]
    delattr(model, _TOP)
    return parts
