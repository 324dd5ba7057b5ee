"""Rows of rendered and of tokenised text, and the objective over both: next patch, next token, or a class."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.train.objective import Objective, Outputs
from modelwright.core.train.technique import LossTerm
from modelwright.models.pixels import targets


@dataclass
class PixelRows(TokenRows):
    """Each row: patches (P, 3pp) uint8, token ids, or both; with a class where texts are sorted."""

    patches: list[Tensor]
    ids: list[Tensor]
    classes: list[int]
    facts: dict[str, Any]
    bytes = 0
    packed = False

    def __post_init__(self) -> None:
        self.stops: list[int] = []

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = self.ids[i]
        return {"input_ids": ids, "labels": ids.long(), "length": torch.tensor(len(ids)), "example_id": i,
                "patches": self.patches[i], "class": self.classes[i]}  # fmt: skip

    @property
    def width(self) -> int:  # type: ignore[override]
        return max(len(p) + len(t) for p, t in zip(self.patches, self.ids, strict=True))

    @property
    def tokens(self) -> int:
        """Patches and tokens."""
        return sum(len(p) + len(t) for p, t in zip(self.patches, self.ids, strict=True))

    def split(self, at: int) -> tuple["PixelRows", "PixelRows"]:
        a, b = ((self.patches[s], self.ids[s], self.classes[s], self.facts) for s in (slice(None, at), slice(at, None)))
        return PixelRows(*a), PixelRows(*b)


@dataclass
class PixelOutputs(Outputs):
    """With the summed token losses of each row, (B,), which have a gradient; right (B,) where texts are sorted."""

    tokens: Tensor | None = None
    right: Tensor | None = None


class TokenTerm(LossTerm):
    """Cross-entropy of the tokens beside the patches: a mean of its own, so that the two count alike."""

    name = "tokens"

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["token_targets"].sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return outputs.tokens


class PixelObjective(Objective):
    """Next patch: mean over 3pp of the squared error, over real patches only. Next token: cross-entropy. Each stream shifts inside itself:
    the last patch has no token to predict, the first token is predicted from nothing."""

    kind, name = "causal", "patches and tokens"

    def __init__(self, model: Any, tokenizer: Any = None, seed: int = 0, how: str = "mended", classify: bool = False, apart: bool = False):
        super().__init__(model, tokenizer, seed)
        self.apart = apart  # tokens are a loss term of their own
        self.how, self.classify, self.size = how, classify, 3 * model.config.patch_size**2

    def install(self, model: Any) -> None:
        """The two heads are called whole."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        empty = torch.zeros(0, self.size, dtype=torch.uint8)
        seen = [r["patches"] if r["example_id"] >= 0 else empty for r in rows]
        said = [r["input_ids"][: int(r["length"])].long() for r in rows]
        p, t = max(map(len, seen)), max(map(len, said))
        p = p if p or t else 1
        patches = torch.stack([F.pad(s, (0, 0, 0, p - len(s)), value=255) for s in seen])
        ids = torch.stack([F.pad(s, (0, t - len(s))) for s in said])
        patch_mask = torch.arange(p) < torch.tensor([len(s) for s in seen])[:, None]
        mask = torch.arange(t) < torch.tensor([len(s) for s in said])[:, None]
        batch = {
            "patches": patches,
            "patch_mask": patch_mask,
            "input_ids": ids,
            "mask": mask,
            "real": torch.cat([patch_mask, mask], 1),
            "example_id": torch.tensor([r["example_id"] for r in rows]),
            "token_targets": mask[:, 1:],
        }
        if self.classify:
            kinds = torch.tensor([r["class"] if r["example_id"] >= 0 else IGNORE for r in rows])[:, None]
            return batch | {"labels": torch.cat([torch.full_like(kinds, IGNORE), kinds], 1)}
        learnt = torch.cat([patch_mask, mask], 1)
        learnt[:, 0] = False
        if 0 < p < learnt.shape[1]:
            learnt[:, p] = False
        labels = torch.where(learnt, torch.cat([torch.zeros(len(rows), p, dtype=torch.long), ids], 1), IGNORE)
        weights = torch.cat([torch.ones(len(rows), p), torch.full((len(rows), t), 0.0 if self.apart else 1.0)], 1)
        return batch | {"labels": labels, "weights": weights}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        both = {"input_ids": batch["input_ids"], "attention_mask": batch["mask"].long()}
        if batch["patches"].shape[1]:
            return both | {"patches": batch["patches"].float() / 255, "patch_mask": self._some(batch)}
        return both | {"joint": True}

    @staticmethod
    def _some(batch: dict[str, Tensor]) -> Tensor:
        """The mask of the patches; a row without anything keeps one place, so that attention has something to go by."""
        mask = batch["patch_mask"].clone()
        mask[:, 0] |= ~batch["real"].any(1)
        return mask

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        out = model(**self.inputs(batch))
        if self.classify:
            goal = batch["labels"][:, 1]
            losses = F.cross_entropy(out.classes.float(), goal, ignore_index=IGNORE, reduction="none")[:, None]
            right = (out.classes.argmax(1) == goal).float()
            return PixelOutputs(losses.detach(), (losses * weights).sum(), None, None, right)
        p = batch["patches"].shape[1]
        losses = torch.zeros(len(weights), batch["labels"].shape[1], device=weights.device)
        if p > 1:
            wanted = targets(batch["patches"].float() / 255, self.how)
            losses[:, 1:p] = (out.pixels[:, :-1].float() - wanted[:, 1:]).square().mean(-1)
        tokens = torch.zeros(len(weights), device=weights.device) + 0 * (out.pixels.sum() + out.logits.sum())
        if batch["input_ids"].shape[1] > 1:
            goal = torch.where(batch["token_targets"], batch["input_ids"][:, 1:], IGNORE)
            each = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), goal.flatten(), ignore_index=IGNORE, reduction="none")
            each = each.view_as(goal)
            losses[:, p + 1 :] = each
            tokens = tokens + each.sum(1)
        used = losses[:, 1:].where(batch["labels"][:, 1:] != IGNORE, 0.0)
        return PixelOutputs(used.detach(), (used * weights).sum(), None, tokens)

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        """Accuracy of classes; else the two losses apart."""
        assert isinstance(outputs, PixelOutputs)
        if self.classify:
            used = batch["labels"][:, 1] != IGNORE
            return {"accuracy": (float((outputs.right * used).sum()), float(used.sum()))}  # type: ignore[operator]
        p = batch["patches"].shape[1]
        learnt = batch["labels"][:, 1:] != IGNORE
        parts = {"pixel_loss": slice(0, max(p - 1, 0)), "token_loss": slice(max(p - 1, 0), None)}
        found = {k: (float(outputs.losses[:, s].sum()), float(learnt[:, s].sum())) for k, s in parts.items()}
        return {k: v for k, v in found.items() if v[1]}
