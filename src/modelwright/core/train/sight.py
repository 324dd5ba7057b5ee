"""What a person sees while it trains, the log of it, and early divergence."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelwright.core.train import dist
from modelwright.core.train.trainer import Trainer


class Sight:
    """What a person sees while it trains: loss, learning rate, gradient norm, tokens per second, time left; and early divergence.

    Numbers are read off the device every few steps only. `log.jsonl` in the run's folder keeps them, one line each.
    """

    def __init__(self, trainer: Trainer, folder: Path, steps: int, say: Callable[[dict[str, Any]], None]):
        self.trainer, self.steps, self.say = trainer, steps, say
        self.every = max(1, steps // 200)
        self.file = folder / "log.jsonl"
        self.lines: list[dict[str, Any]] = []
        self._clock, self._tokens = time.perf_counter(), 0
        self._smooth: float | None = None
        self._lowest = float("inf")

    def resume(self, step: int) -> None:
        """Take up the log of a stopped run, without what comes after `step`."""
        self._tokens = self.trainer.tokens
        if self.file.is_file():
            for line in self.file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if (row := json.loads(line))["step"] <= step:
                        self.lines.append(row)
        if dist.rank() == 0:
            self.file.write_text("".join(json.dumps(row) + "\n" for row in self.lines))

    def step(self, step: int) -> str | None:
        """Note a step; a sentence where training diverges."""
        if step % self.every and step != self.steps and step > 3:
            self.trainer.seen.clear()
            return None
        loss, now, t = self.trainer.step_loss(), time.perf_counter(), self.trainer
        speed = (t.tokens - self._tokens) / max(now - self._clock, 1e-9)
        per_step = (t.tokens / max(step, 1)) / max(speed, 1e-9)
        self._clock, self._tokens = now, t.tokens
        norm = None if t.norm is None else float(t.norm.full_tensor() if hasattr(t.norm, "full_tensor") else t.norm)
        row = {"step": step, "loss": loss, "lr": t.lr_used, "grad_norm": norm, "tokens": t.tokens}
        told = row | {"tokens_per_second": round(speed, 1), "seconds_left": round(per_step * (self.steps - step), 1)}
        self.lines.append(told)
        if dist.rank() == 0:
            with open(self.file, "a") as file:
                file.write(json.dumps(told) + "\n")
        if t.args.report_to:
            t.log({k: v for k, v in told.items() if k != "step" and v is not None})
        if t.recorder:
            t.recorder.step(step, loss, t.lr_used, norm)
        self.say(told)
        return self._diverges(step, loss)

    def _diverges(self, step: int, loss: float) -> str | None:
        if loss != loss or loss in (float("inf"), float("-inf")):
            return f"the loss is not finite at step {step}"
        factor = self.trainer.settings.divergence
        self._smooth = loss if self._smooth is None else 0.8 * self._smooth + 0.2 * loss
        self._lowest = min(self._lowest, self._smooth)
        if factor and self._smooth > factor * self._lowest and self._smooth > self._lowest + 1:
            return f"training diverges: the smoothed loss rose from {self._lowest:.3f} to {self._smooth:.3f} by step {step}"
        return None
