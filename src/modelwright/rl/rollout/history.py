"""What an update was like: one entry each, and the pictures of them."""

from typing import Any

import torch
from torch import Tensor

from modelwright.core.train import dist

_PICTURES = {
    "score": "reward",
    "kl": "KL from the reference (nats a response)",
    "entropy": "entropy (nats a token)",
    "clipped": "share of ratios out of reach",
    "length": "response tokens",
    "value loss": "value loss",
}


class History:
    """`updates` holds plain numbers. What the passes of a step see is noted and added up over all processes after the step."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._sums = torch.zeros(3, dtype=torch.float64)  # ratios out of reach, value loss, tokens: of the step under way

    def begin(self, update: int, kept: dict[str, Tensor]) -> None:
        """An update with its roll-outs."""
        means = {name: float(kept[name].mean()) for name in ("score", "kl", "entropy", "ended", "actions")}
        length = float((kept["length"] - kept["begin"]).float().mean())
        self.updates.append({"update": update + 1, "length": length, **means, "clipped": 0.0, "value loss": 0.0, "tokens": 0.0})

    def note(self, sums: Tensor) -> None:
        """Ratios out of reach, value loss and tokens of one pass."""
        self._sums += sums.double().cpu()

    def step(self) -> None:
        """Called after each optimizer step, by every process."""
        far, value, tokens = dist.sum_over_ranks(*self._sums.unbind())
        self._sums = torch.zeros_like(self._sums)
        now = self.updates[-1]
        before, total = now["tokens"], now["tokens"] + float(tokens)
        for name, new in (("clipped", far), ("value loss", value)):
            now[name] = (now[name] * before + float(new)) / max(total, 1.0)
        now["tokens"] = total

    def facts(self) -> dict[str, Any]:
        """Means over the first and the last tenth of the updates."""
        tenth = max(1, len(self.updates) // 10)
        ends = {"first": self.updates[:tenth], "last": self.updates[-tenth:]}
        names = {"score": "reward", "kl": "KL (nats a response)", "entropy": "entropy (nats)", "length": "response tokens"}
        told = {label: {w: sum(h[n] for h in hs) / len(hs) for w, hs in ends.items()} for n, label in names.items()}
        return {"updates": len(self.updates), "macro actions a response": self.updates[-1]["actions"], **told}

    def plots(self) -> list[dict[str, Any]]:
        """Reward, KL, entropy, clip share, length and value loss over the updates."""
        panels = [
            {"kind": "line", "title": t, "x": "update", "y": "", "series": {t: [[h["update"], h[n]] for h in self.updates]}}
            for n, t in _PICTURES.items()
        ]
        return [{"kind": "panels", "title": "PPO", "plots": panels}]
