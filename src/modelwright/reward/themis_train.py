"""Themis (2310.01045): a reward model that calls tools and writes down why, trained on traces and on pairs at once.

What for: rewards of answers that a scalar cannot check (arithmetic, dates, code, facts), with a trace that a person can read. The model
learns to think, to call a tool, to read what it says, to write a rationale, and to give a reward at the end of all that:
    L = ranking * L_RM + alpha * sum over calls (L_tool + beta * L_observation) + omega * L_rationale,   L_RM = -log sigmoid(r+ - r-)
The terms of the trace are cross-entropies, their mean is over the learnt tokens of the batch. alpha, beta, omega are 0 or 1 in the paper's
ablations. The official code weighs the ranking loss by 0.5 and the trace by 1; it also learns the good answer itself (`learn_answer`),
because its mask covers the question alone.

Data are rows with `question`, `pos_answer` and `neg_answer`, each with `answer`, `actions` and `score_agent.explanation`, as in the
authors' data set TARA (json, json.gz or jsonl). Its calculator observations were made with the right answer at hand and give it away:
`observations: rerun` makes those of calculator and code again. Text form of a trace: modelwright.reward.tools.traces.

What is ours: the three tokens that part a trace start as the mean of all embeddings, not as random ones; every piece is tokenised for
itself, so that masks are exact. The result is `ToolRewardModel` (modelwright.models.tool_reward); `reward themis` runs and measures it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.head import ChunkedHead
from modelwright.core.train.objective import NextToken, Objective, Outputs, objective_class
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.models.tool_reward import ToolRewardModel, tool_reward_model
from modelwright.reward.tools.builtin import toolbox
from modelwright.reward.tools.encode import traced_rows, traces_together, with_special
from modelwright.reward.tools.replay import read_pairs, rerun
from modelwright.reward.tools.traces import Part


@dataclass(frozen=True)
class Knobs(Tune):
    ranking: float = knob(1.0, "weight of the ranking loss; the official code has 0.5", low=0)
    alpha: float = knob(1.0, "weight of thoughts and calls", low=0)
    beta: float = knob(1.0, "weight of observations, times alpha", low=0)
    omega: float = knob(1.0, "weight of rationales", low=0)
    learn_answer: bool = knob(False, "learn the good answer too, as the official code does")
    observations: Literal["stored", "rerun"] = knob("stored", "rerun: calculator and code observations are made again")


@dataclass
class ScoredTraces(Outputs):
    """With the rewards (2B,) of the chosen and then of the rejected traces."""

    rewards: Any = None


class TracedPairs(Objective):
    """Cross-entropy of the traces; the ranking loss is a further term."""

    kind, name, unit = "ranked", "traced pairs", "nats per pair"

    def install(self, model: Any) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = ChunkedHead.install(core.model)
        if self.head is None:
            raise UserError(
                f"the head of {type(core.model).__name__} cannot be called alone", "its losses are made in chunks", "give another"
            )

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return traces_together(rows)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask")} | {"use_cache": False}

    def states(self, hidden: Tensor) -> Tensor:
        return hidden[:, :-1]

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> ScoredTraces:
        labels = batch["labels"][:, 1:]
        losses, total, rewards = model(**self.inputs(batch), loss_of=(labels, weights, self.states))
        return ScoredTraces(losses, total, rewards.detach(), rewards)

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        assert outputs.logits is not None
        right, used = outputs.logits.chunk(2)[0] > outputs.logits.chunk(2)[1], _used(batch)
        return {"accuracy": (float((right & used).sum()), float(used.sum()))}


def _used(batch: dict[str, Tensor]) -> Tensor:
    """Which pairs of a batch are real, (B,)."""
    return batch["example_id"].chunk(2)[0] >= 0


class Ranking(LossTerm):
    """-log sigmoid(r+ - r-), a mean over pairs."""

    name = "ranking"

    def __init__(self, weight: float):
        self.weight = weight

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return _used(batch).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        chosen, rejected = outputs.rewards.chunk(2)
        return -F.logsigmoid(chosen - rejected) * _used(batch)


class ThemisTrain(Technique):
    """Brings the model with its head, rows of traces, and the ranking loss."""

    name = "themis"
    same_kind = False

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.new_tokens = 0

    def load(self, source: Any, dtype: Any) -> ToolRewardModel:
        core, self.tokenizer = source.model(dtype), source.tokenizer()
        if isinstance(core, ToolRewardModel):
            return core
        if objective_class(core) is not NextToken:
            raise UserError(f"{type(core).__name__} does not go on with a text", "traces are written", "give a causal language model")
        self.new_tokens = with_special(self.tokenizer)
        before = core.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > before:
            core.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            for table in (core.get_input_embeddings(), core.get_output_embeddings()):
                if table is not None and table.weight.shape[0] == len(self.tokenizer):
                    with torch.no_grad():
                        table.weight[before:] = table.weight[:before].float().mean(0).to(table.weight.dtype)
        return tool_reward_model(core, self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> TracedPairs:
        return TracedPairs(model, tokenizer, seed)

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows | None:
        if not data.path:
            return None
        pairs = read_pairs(Path(data.path).expanduser())[: data.limit]
        if self.knobs.observations == "rerun":
            tools = toolbox()
            pairs = [rerun(p, tools) for p in pairs]
        k = self.knobs
        weights: dict[Part, float] = {"prompt": 0.0, "tool": k.alpha, "observation": k.alpha * k.beta, "rationale": k.omega}
        if self.tokenizer is None:  # a preview
            self.tokenizer = tokenizer
            with_special(tokenizer)
        return traced_rows(pairs, self.tokenizer, train.context, weights, k.learn_answer)

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        core.score.weight.requires_grad_()  # adapters froze it
        if not bool(core.score.weight.any()):
            draw = torch.randn(core.score.weight.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                core.score.weight.copy_(draw * (getattr(core.config.get_text_config(), "initializer_range", None) or 0.02))

    def terms(self) -> list[LossTerm]:
        return [Ranking(self.knobs.ranking)] if self.knobs.ranking else []

    def facts(self) -> dict[str, Any]:
        return {"tokens added": self.new_tokens}


METHOD = ThemisTrain
