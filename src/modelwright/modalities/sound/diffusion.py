"""v-diffusion in continuous time: the schedule, the identities, the objective, the average of the weights, and the sampler."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError, short
from modelwright.core.train.objective import Objective, Outputs
from modelwright.core.train.technique import Named, Technique

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy wave (B, L) and time (B,) -> v (B, L)


def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = cos(pi t / 2) and sigma = sin(pi t / 2), with a dimension more: alpha^2 + sigma^2 = 1."""
    return torch.cos(math.pi / 2 * t)[:, None], torch.sin(math.pi / 2 * t)[:, None]


def noisy(x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z = alpha x + sigma eps, and v = alpha eps - sigma x."""
    a, s = schedule(t)
    return a * x + s * eps, a * eps - s * x


def clean(z: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x = alpha z - sigma v, and eps = sigma z + alpha v."""
    a, s = schedule(t)
    return a * z - s * v, s * z + a * v


def as_v(out: Tensor, z: Tensor, t: Tensor, prediction: str) -> Tensor:
    """v from what a model predicts. The noise says nothing of the wave where alpha is 0, so alpha is held above 0.01 there."""
    a, s = schedule(t)
    if prediction == "v":
        return out
    if prediction == "eps":
        return (out - s * z) / a.clamp(min=0.01)
    return (a * z - out) / s.clamp(min=0.01)


@torch.no_grad()
def ddim(predict: Predict, z: Tensor, steps: int, tick: Callable[[int], None] = lambda n: None) -> Tensor:
    """From noise z (B, L) at time 1 to a wave at time 0, the same for the same noise. Nothing is clipped."""
    times = torch.linspace(1, 0, steps + 1)
    for now, after in zip(times[:-1], times[1:], strict=True):
        t = torch.full((len(z),), float(now))
        x, eps = clean(z, predict(z, t), t)
        a, s = schedule(torch.full((len(z),), float(after)))
        z = x if float(after) == 0 else a * x + s * eps
        tick(1)
    return z


@torch.no_grad()
def by_scheduler(predict: Predict, z: Tensor, steps: int, scheduler: Any) -> Tensor:
    """The same through a scheduler of diffusers (DDIMScheduler, DPMSolverMultistepScheduler ...) that was made with
    prediction_type="v_prediction": its discrete times are those of our schedule with the same alpha."""
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        alpha = float(scheduler.alphas_cumprod[int(step)]) ** 0.5
        t = torch.full((len(z),), 2 / math.pi * math.acos(min(1.0, alpha)))
        z = scheduler.step(predict(z, t), step, z).prev_sample
    return z


def scheduler_named(name: str) -> Any:
    """A scheduler of diffusers for v-prediction."""
    try:
        import diffusers
    except ImportError:
        raise UserError(
            "diffusers is not installed", f"sampler={name} is one of its schedulers", "pip install diffusers, or sampler: ddim"
        ) from None
    kind: Any = getattr(diffusers, name, None)
    settings = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    try:
        return kind.from_config(settings)
    except Exception as error:
        raise UserError(f"sampler={name} is no scheduler of diffusers", short(error), "write DDIMScheduler, or ddim") from None


def guided(model: Any, told: dict[str, Tensor], weight: float) -> Predict:
    """v_u + w (v_c - v_u): w = 1 is the conditional call and w = 0 the unconditional one, else both go through the model together."""
    prediction = model.config.prediction

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if weight in (0.0, 1.0):
            return as_v(model(z, t, **(told if weight else {})), z, t, prediction)
        blank = {k: v if k != "mask" else torch.zeros_like(v) for k, v in told.items()}
        both = {k: torch.cat([v, blank[k]]) for k, v in told.items()}
        zz, tt = torch.cat([z, z]), torch.cat([t, t])
        with_text, without = as_v(model(zz, tt, **both), zz, tt, prediction).chunk(2)
        return without + weight * (with_text - without)

    return predict


# ---- training --------------------------------------------------------------------------------------------------------------
@dataclass
class WaveRows(TokenRows):
    """waves (N, L), each of mean square 1; the number of each row's prompt; the prompts' states (n, D) or word ids (n,)."""

    waves: Tensor
    prompt: list[int]
    told: list[Tensor]
    facts: dict[str, Any]
    bytes = 0
    packed = False

    def __post_init__(self) -> None:
        self.stops: list[int] = []

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"wave": self.waves[i], "told": self.told[self.prompt[i]], "example_id": i, "length": torch.tensor(1),
                "input_ids": torch.zeros(1, dtype=torch.int32), "labels": torch.zeros(1, dtype=torch.long)}  # fmt: skip

    @property
    def width(self) -> int:  # type: ignore[override]
        return 2

    @property
    def tokens(self) -> int:
        """Clips."""
        return len(self.waves)

    def split(self, at: int) -> tuple["WaveRows", "WaveRows"]:
        a, b = ((self.waves[s], self.prompt[s], self.told, self.facts) for s in (slice(None, at), slice(at, None)))
        return WaveRows(*a), WaveRows(*b)


def together(told: list[Tensor]) -> dict[str, Tensor]:
    """Prompts of several lengths as a batch: `text` of states or `words` of ids, with a mask."""
    longest = max(1, *(len(p) for p in told))
    mask = torch.arange(longest) < torch.tensor([len(p) for p in told])[:, None]
    whole = told[0].new_zeros(len(told), longest, *told[0].shape[1:])
    for i, p in enumerate(told):
        whole[i, : len(p)] = p
    return {"text" if whole.dim() == 3 else "words": whole, "mask": mask}


class Diffusion(Objective):
    """Mean over a clip of |v_theta(z_t, t, y) - v|^2, t uniform; the text is dropped with probability `drop`. Times, noise and drops are
    drawn by the seed, the step and the clip alone."""

    kind, name, unit = "causal", "v-diffusion", "mean squared error"

    def __init__(self, model: Any, seed: int = 0, drop: float = 0.15):
        super().__init__(model, None, seed)
        self.drop = drop

    def install(self, model: Any) -> None:
        """The model gives no logits."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        real = torch.tensor([r["example_id"] >= 0 for r in rows])
        length = next((len(r["wave"]) for r in rows if "wave" in r), 8)
        first = next((r["told"] for r in rows if "told" in r), torch.zeros(0, dtype=torch.long))
        waves = torch.stack([r.get("wave", torch.zeros(length)) for r in rows])
        labels = torch.where(real, 0, IGNORE)[:, None]
        batch = together([r.get("told", first[:0]) for r in rows]) | {
            "x": waves,
            "labels": torch.cat([torch.full_like(labels, IGNORE), labels], 1),
            "real": real[:, None],
            "example_id": torch.tensor([r["example_id"] for r in rows]),
        }
        batch["kept"] = batch["mask"].clone()
        self.prepare(batch, 0)
        return batch

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        times, noise, keep = [], [], []
        for example in batch["example_id"].tolist():
            rng = np.random.default_rng((self.seed, step, example + 1))
            times.append(rng.random())
            keep.append(rng.random() >= self.drop)
            noise.append(torch.from_numpy(rng.standard_normal(batch["x"].shape[1], dtype=np.float32)))
        device = batch["x"].device
        batch["time"] = torch.tensor(times, dtype=torch.float32, device=device)
        batch["eps"] = torch.stack(noise).to(device)
        batch["mask"] = batch["kept"] & torch.tensor(keep, device=device)[:, None]

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("text", "words", "mask") if k in batch}

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        z, v = noisy(batch["x"], batch["eps"], batch["time"])
        out = model(wave=z, time=batch["time"], **self.inputs(batch))
        goal = {"v": v, "eps": batch["eps"], "x": batch["x"]}[self.config.prediction]
        losses = (out.float() - goal).square().mean(1, keepdim=True)
        losses = losses.where(batch["labels"][:, 1:] != IGNORE, 0.0)
        return Outputs(losses.detach(), (losses * weights).sum())


class Average(Technique):
    """An exponential moving average of the weights, which is what is kept: m <- d m + (1 - d) w, with d lower in the first steps."""

    name = "average"

    def __init__(self, decay: float = 0.995):
        self.decay, self.count = decay, 0
        self.mean: dict[str, Tensor] = {}

    def after_step(self, named: Named) -> None:
        self.count += 1
        d = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, p in named:
            kept = self.mean.get(name)
            self.mean[name] = p.detach().clone() if kept is None else kept.lerp_(p.detach(), 1 - d)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]

    @torch.no_grad()
    def export(self, model: Any, folder: Any) -> Any:
        for name, p in model.named_parameters():
            p.copy_(self.mean[name])
        return model
