"""A reward model from pairs of answers (Bradley-Terry), with the biases of prompt and length taken out while it is trained.

What for: a score for best-of-n, filtering or reinforcement learning. Pairs are `chosen` and `rejected`, with or without `prompt`, texts or
conversations; any causal decoder, or a reward model that is to be trained on. r is a linear head on the state of the last token:
    L_BT = -log sigmoid(r(x, y+) - r(x, y-) - margin)  +  center * (r(x, y+) + r(x, y-))^2

A reward is known only up to an offset of each prompt. Where all answers to one kind of prompt share a format, that offset is arbitrary, and
scores of different prompts cannot be compared. `debias` chooses what is done about it:
- pbc, Prompt Bias Calibration (ACL Findings 2025, 1237): C(x) is a second head at the end of the prompt;
      L = L_BT + eta_c [(r(x, y+) - C)^2 + (r(x, y-) - C)^2],   and r - C is used afterwards.
  As (a-C)^2 + (b-C)^2 = 2 (C - (a+b)/2)^2 + (a-b)^2 / 2, C is the mean of its pair and the margin D of a pair alone settles where
  sigmoid(-D) = eta_c D. `detach` trains C alone and leaves r as it is.
- odin (2402.07319): two heads on the same states, r_Q and r_L; L_BT is on their sum, and r_Q alone is used afterwards;
      L = L_BT + eta_l [|rho(r_Q, length)| - rho(r_L, length) + |W_Q W_L^T|],   rho: Pearson over the answers of a batch.
- lpbc: both. r_Q and r_L each have a bias of the prompt, and eta_l weighs |rho(r_Q - C_Q, length)| - rho(r_L - C_L, length).

`loss_positions: divergent` is DeepSpeed-Chat's loss: the mean over the tokens from the first that differs to the last; a shorter answer
keeps its last score (the official code reads on into the padding). Where the head of C reads is not printed in what could be read of the
PBC paper; the end of the prompt is the one place that no answer can change. `bias_at: sequence_end` is there to compare.

C cancels in the advantages of GRPO and RLOO and in pairs of one prompt (DPO): there only the loss term has an effect. In PPO it is a
baseline that changes clipping, whitening and the critic's targets. ODIN's own coefficients were not verified; eta_l is LPBC's.

A model without extra heads is saved as transformers' sequence classifier with num_labels 1, as TRL's is. With them it is `RewardModel`
(modelwright.models.reward), whose logits[:, 0] are the debiased reward. Heads start as small random numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.objective import Outputs, RankedPairs, pairs_together
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.models.reward import CANCELS, HEADS, RewardModel, reward_model, stock


@dataclass(frozen=True)
class Knobs(Tune):
    debias: Literal["none", "pbc", "odin", "lpbc"] = knob("none", "which bias is taken out: of the prompt, of the length, of both")
    eta_c: float = knob(0.05, "pbc, lpbc: weight of the fit of the prompt's bias", low=0)
    eta_l: float = knob(0.05, "odin, lpbc: weight of the correlations with the length", low=0)
    detach: bool = knob(False, "pbc, lpbc: fit the prompt's bias without a gradient to the reward")
    bias_at: Literal["prompt_end", "sequence_end"] = knob("prompt_end", "where the prompt's bias is read")
    loss_positions: Literal["last", "divergent"] = knob("last", "compare the last tokens, or every token from the first that differs")
    margin: float = knob(0.0, "how much better the chosen answer must be", low=0)
    center: float = knob(0.0, "weight of (r+ + r-)^2", low=0, alias="center_rewards_coefficient")


@dataclass
class Scored(Outputs):
    """With r (2B,) of the chosen and then of the rejected answers, the bias of their prompts, and those of the length's head."""

    rewards: Any = None
    bias: Any = None
    length_rewards: Any = None
    length_bias: Any = None


# ---- the losses --------------------------------------------------------------------------------------------------------
def ranking_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """-log sigmoid(r+ - r- - margin) of each pair, (B,)."""
    return -F.logsigmoid(chosen - rejected - margin)


def divergent_loss(tokens: Tensor, last: Tensor, ids: Tensor, margin: float = 0.0) -> Tensor:
    """The mean of the ranking loss from the first token that differs to the last of the longer answer, (B,).

    tokens (2B, T): r at every token; last (2B,): places of the last tokens; ids (2B, T).
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    kept = tokens.gather(1, torch.minimum(places, last[:, None]))  # after its end an answer keeps its last score
    chosen, rejected = kept.chunk(2)
    begin = (ids.chunk(2)[0] != ids.chunk(2)[1]).int().argmax(1, keepdim=True)
    used = (places >= begin) & (places <= torch.maximum(*last.chunk(2))[:, None])
    return (ranking_loss(chosen, rejected, margin) * used).sum(1) / used.sum(1).clamp(min=1)


def bias_loss(rewards: Tensor, bias: Tensor, detach: bool = False) -> Tensor:
    """(r+ - C)^2 + (r- - C)^2 of each pair, (B,), from (2B,) rewards and biases."""
    off = (rewards.detach() if detach else rewards) - bias
    return off.square().chunk(2)[0] + off.square().chunk(2)[1]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two vectors; 0 where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() * torch.rsqrt(a.square().sum() * b.square().sum() + 1e-12)


# ---- as parts of the training loop -------------------------------------------------------------------------------------
class RewardPairs(RankedPairs):
    """The ranking loss of a RewardModel."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, knobs: Knobs):
        super().__init__(model, tokenizer, seed)
        self.knobs = knobs

    def install(self, model: Any) -> None:
        """The model finds the last token itself."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        nothing = torch.zeros(0, dtype=torch.long)  # a row that only fills the batch up
        batch = pairs_together([r if "chosen" in r else r | {"chosen": nothing, "rejected": nothing} for r in rows])
        return batch | {"prompt_lengths": batch["answer"].int().argmax(1)}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask", "prompt_lengths")} | {"use_cache": False}

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Scored:
        out = model(**self.inputs(batch))
        both = out.rewards if out.length_rewards is None else out.rewards + out.length_rewards
        difference = both.chunk(2)[0] - both.chunk(2)[1]
        if self.knobs.loss_positions == "divergent":
            tokens = out.token_rewards if out.length_rewards is None else out.token_rewards + out.length_token_rewards
            each = divergent_loss(tokens, out.last, batch["input_ids"], self.knobs.margin)
        else:
            chosen, rejected = both.chunk(2)
            each = ranking_loss(chosen, rejected, self.knobs.margin)
        losses = each[:, None] * _used(batch)[:, None]
        logits = difference[:, None].detach()
        return Scored(losses.detach(), (losses * weights).sum(), logits, out.rewards, out.bias, out.length_rewards, out.length_bias)


def _used(batch: dict[str, Tensor]) -> Tensor:
    """Which pairs of a batch are real, (B,)."""
    return batch["labels"][:, 1] != IGNORE


class _PairTerm(LossTerm):
    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return _used(batch).sum()


class PromptBias(_PairTerm):
    """The fit of the prompt's bias, of the length's too where it has one."""

    name = "prompt bias"

    def __init__(self, knobs: Knobs):
        self.weight, self.detach = knobs.eta_c, knobs.detach

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        total = bias_loss(outputs.rewards, outputs.bias, self.detach)
        if outputs.length_bias is not None:
            total = total + bias_loss(outputs.length_rewards, outputs.length_bias, self.detach)
        return total * _used(batch)


class Centre(_PairTerm):
    """TRL's `center_rewards_coefficient`."""

    name = "centre"

    def __init__(self, knobs: Knobs):
        self.weight = knobs.center

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        return (outputs.rewards.chunk(2)[0] + outputs.rewards.chunk(2)[1]).square() * _used(batch)


class Lengths(LossTerm):
    """The correlations with the length of the answers in tokens; a mean over micro-batches."""

    name = "length"

    def __init__(self, owner: "TrainReward"):
        self.owner, self.weight = owner, owner.knobs.eta_l

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=batch["labels"].device)

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        used, length = _used(batch).repeat(2), batch["answer"].sum(1).float()
        quality, by_length = outputs.rewards, outputs.length_rewards
        if outputs.bias is not None:
            quality, by_length = quality - outputs.bias, by_length - outputs.length_bias
        if not bool(used.any()):
            return 0 * quality.sum()[None]
        total = pearson(quality[used], length[used]).abs() - pearson(by_length[used], length[used])
        if outputs.bias is None:
            model = self.owner.model
            total = total + (model.score.weight * model.length_score.weight).sum().abs()
        return total[None]


class TrainReward(Technique):
    """Brings the model with its heads, the ranking objective, and the terms of the biases."""

    name = "reward"
    same_kind = False

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.has_bias, self.has_length = knobs.debias in ("pbc", "lpbc"), knobs.debias in ("odin", "lpbc")
        if self.has_length:
            self.supports = Technique.supports - {"fsdp2"}  # |W_Q W_L^T| needs whole heads outside the forward pass
        self.model: Any = None
        self.fresh: list[str] = []

    def load(self, source: Any, dtype: Any) -> RewardModel:
        core = source.model(dtype)
        self.model = reward_model(core, bias=self.has_bias, bias_at=self.knobs.bias_at, length_head=self.has_length)
        old = dict(core.named_modules())
        self.fresh = [n for n in HEADS if hasattr(self.model, n) and not (n in old and old[n].weight.shape[0] == 1)]
        return self.model

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> RewardPairs:
        if tokenizer is not None and tokenizer.pad_token is None:  # TRL's choice too; the folder then says it
            tokenizer.pad_token = tokenizer.eos_token
            self.tokenizer = tokenizer
        if tokenizer is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return RewardPairs(model, tokenizer, seed, self.knobs)

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        draw = torch.Generator().manual_seed(seed)
        for name in HEADS:
            if head := getattr(core, name, None):
                head.weight.requires_grad_()  # adapters froze it
                if name in self.fresh:
                    std = getattr(core.config.get_text_config(), "initializer_range", None) or 0.02
                    with torch.no_grad():
                        head.weight.copy_(torch.randn(head.weight.shape, generator=draw) * std)

    def prepare(self, rows: TokenRows) -> TokenRows:
        if self.has_bias and self.knobs.bias_at == "prompt_end":
            self.model.config.prompt_end = prompt_end(rows)
        return rows

    def terms(self) -> list[LossTerm]:
        found: list[LossTerm] = [PromptBias(self.knobs)] if self.has_bias and self.knobs.eta_c else []
        if self.has_length and self.knobs.eta_l:
            found.append(Lengths(self))
        return [*found, *([Centre(self.knobs)] if self.knobs.center else [])]

    def facts(self) -> dict[str, Any]:
        if not self.has_bias:
            return {}
        marker = self.model.config.prompt_end
        end = "given with each call" if not marker else f"found by the {len(marker)} tokens that end every prompt"
        return {"the end of a prompt is": end, "where the bias does nothing": CANCELS}

    def export(self, model: Any, folder: Path) -> Any:
        return stock(model) if isinstance(model, RewardModel) else model


def prompt_end(rows: TokenRows, most: int = 2000) -> list[int]:
    """The tokens that end every prompt and stand nowhere later in its answer, or none. UserError for an answer without a prompt."""
    marker: list[int] | None = None
    looked = [rows[i] for i in range(0, len(rows), max(1, len(rows) // most))]
    for row in looked:
        for name in ("chosen", "rejected"):
            prompt = row[name][: row[f"{name}_from"]].tolist()
            if not prompt:
                raise UserError(
                    f"pair {row['example_id'] + 1} has no prompt",
                    "its bias is read at the end of one",
                    "give a prompt, or set debias: none",
                )
            marker = prompt[-16:] if marker is None else marker
            same = 0
            while same < min(len(marker), len(prompt)) and marker[-1 - same] == prompt[-1 - same]:
                same += 1
            marker = marker[len(marker) - same :]
    for row in looked:
        for name in ("chosen", "rejected"):
            later = row[name][row[f"{name}_from"] - len(marker or []) + 1 :].tolist()
            if marker and any(later[i : i + len(marker)] == marker for i in range(len(later) - len(marker) + 1)):
                return []
    return marker or []


METHOD = TrainReward
