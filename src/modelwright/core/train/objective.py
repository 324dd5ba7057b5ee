"""What a batch is, how it becomes outputs, what the loss is: next tokens, masked tokens, pairs for an encoder-decoder, ranked pairs.

The loop owns everything else (counts over window and processes, accumulation, precision, sharding, resume), so every technique runs under
every objective. Whatever the objective, `labels[:, 1:]` of a batch are the targets, -100 where there is none, and `Outputs.losses` has
their shape; `real` and `example_id` are always there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.encode import Kind
from modelwright.core.data.make import make_rows
from modelwright.core.data.rows import IGNORE, TokenRows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.train.head import ChunkedHead


@dataclass
class Outputs:
    """losses (B, T-1): unweighted and without a gradient; total: their weighted sum, with one. logits only where they were asked for."""

    losses: Tensor
    total: Tensor
    logits: Tensor | None = None


class Objective(ABC):
    """One way to turn rows into a loss. `whole_logits` keeps the logits of all tokens for methods that read them."""

    kind: Kind
    name: str
    unit = "nats per token"  # of its loss
    whole_logits = False

    def __init__(self, model: Any, tokenizer: Any = None, seed: int = 0, mask_share: float = 0.15):
        self.config, self.tokenizer, self.seed, self.mask_share = model.config, tokenizer, seed, mask_share
        self.head: ChunkedHead | None = None

    def rows(self, data: Data, vocab: int, train: Train, bins: int, packing: bool) -> TokenRows:
        """The rows of a source."""
        packing = packing and self.kind == "causal"
        return make_rows(data, self.tokenizer, vocab, train.context, kind=self.kind, packing=packing, bins=bins, seed=self.seed)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors."""
        return collate(rows)

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:  # noqa: B027 - most have nothing to do
        """Change a batch in place before its targets are counted, by the step and the example alone."""

    @abstractmethod
    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the model is given."""

    def states(self, hidden: Tensor) -> Tensor:
        """The states that predict labels[:, 1:]."""
        return hidden

    def install(self, model: Any) -> None:
        """Let the model give losses over chunks of tokens; where its head cannot be called alone, whole logits are used."""
        self.head = None if self.whole_logits else ChunkedHead.install(model)

    def remove(self) -> None:
        """Undo `install`."""
        if self.head is not None:
            self.head.remove()
            self.head = None

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        """Losses of the targets and their sum with `weights` (B, T-1)."""
        labels = batch["labels"][:, 1:]
        if self.head is not None:
            losses, total = model(**self.inputs(batch), loss_of=(labels, weights, self.states))
            return Outputs(losses, total)
        logits = model(**self.inputs(batch)).logits
        flat = F.cross_entropy(self.states(logits).flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
        losses = flat.view_as(labels)
        return Outputs(losses.detach(), (losses * weights).sum(), logits)

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        """Further measures of an evaluation batch: name -> (sum, count)."""
        return {}


class NextToken(Objective):
    """Each token is predicted from those before it."""

    kind, name = "causal", "next token"

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch} | {"use_cache": False}

    def states(self, hidden: Tensor) -> Tensor:
        return hidden[:, :-1]


class MaskedTokens(Objective):
    """BERT's (1810.04805): a share of the tokens is to be found again; 80 % of them are hidden, 10 % replaced, 10 % left as they are.

    Which ones is drawn anew in each step, by the seed, the step and the example, so that neither accumulation nor the number of processes
    changes it.
    """

    kind, name = "masked", "masked tokens"

    def __init__(self, model: Any, tokenizer: Any = None, seed: int = 0, mask_share: float = 0.15):
        super().__init__(model, tokenizer, seed, mask_share)
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token", f"{type(model).__name__} learns from masked tokens", "add tokenizer files")
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        around = []
        for r in rows:
            n, ids = int(r["length"]), r["input_ids"]
            ids = torch.cat([ids.new_tensor([first]), ids[:n], ids.new_tensor([last])]) if n else ids[:0]
            around.append({"input_ids": ids, "labels": ids, "length": torch.tensor(len(ids)), "example_id": r["example_id"]})
        batch = collate(around)
        batch["whole"] = batch.pop("input_ids")
        self.prepare(batch, 0)
        return batch

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        ids = batch["whole"]
        words = batch["real"] & ~torch.isin(ids, self._special.to(ids.device))
        draws = torch.stack([self._draw(e, step, ids.shape[1]) for e in batch["example_id"].tolist()]).to(ids.device)  # (B, 3, T)
        chosen = words & (draws[:, 0] < self.mask_share)
        other = (draws[:, 2] * int(self.config.vocab_size)).long().clamp(max=int(self.config.vocab_size) - 1)
        hidden = torch.where(
            draws[:, 1] < 0.8, torch.full_like(ids, self.tokenizer.mask_token_id), torch.where(draws[:, 1] < 0.9, other, ids)
        )
        batch["input_ids"] = torch.where(chosen, hidden, ids)
        labels = torch.where(chosen, ids, IGNORE)
        batch["labels"] = torch.cat([torch.full_like(labels[:, :1], IGNORE), labels], 1)

    def _draw(self, example: int, step: int, n: int) -> Tensor:
        """Three numbers a token (3, n); those of a token depend on its place alone, not on how wide its batch is."""
        rng = np.random.default_rng((self.seed, step, example + 1))
        return torch.from_numpy(rng.random((n, 3)).T.astype(np.float32))

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}


class PairsOfTexts(Objective):
    """An encoder reads what is given, a decoder learns what follows (T5, BART)."""

    kind, name = "pairs", "pairs"

    def __init__(self, model: Any, tokenizer: Any = None, seed: int = 0, mask_share: float = 0.15):
        super().__init__(model, tokenizer, seed, mask_share)
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(model.config, "bos_token_id", None) or getattr(model.config, "pad_token_id", None) or 0
        self._start: int = start
        self._pad = model.config.pad_token_id or 0
        self._end = None if tokenizer is None else tokenizer.eos_token_id

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        given, learnt = [], []
        for r in rows:
            ids, mask = r["input_ids"][: int(r["length"])], r["labels"][: int(r["length"])] != IGNORE
            given.append(torch.cat([ids[~mask], ids.new_tensor([] if self._end is None or not len(ids) else [self._end])]))
            learnt.append(ids[mask])
        whole = _padded(given, self._pad)
        labels, real = _padded(learnt, IGNORE), _padded([torch.ones_like(g) for g in given], 0).bool()
        decoder = torch.cat([torch.full_like(labels[:, :1], self._start), labels[:, :-1]], 1)
        return {
            "input_ids": whole,
            "attention_mask": (real | (~real.any(1, keepdim=True) & (torch.arange(whole.shape[1]) == 0))).long(),
            "decoder_input_ids": torch.where(decoder == IGNORE, self._pad, decoder),
            "labels": torch.cat([torch.full_like(labels[:, :1], IGNORE), labels], 1),
            "real": real,
            "decoder_real": labels != IGNORE,
            "example_id": torch.tensor([r["example_id"] for r in rows]),
        }

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")} | {"use_cache": False}


class RankedPairs(Objective):
    """A reward model: -log sigmoid(r(chosen) - r(rejected)) (Bradley-Terry, as in 2203.02155); one loss a pair."""

    kind, name, unit = "ranked", "ranked pairs", "nats per pair"

    def install(self, model: Any) -> None:
        self._pad = model.config.pad_token_id
        if self._pad is None:
            model.config.pad_token_id = self._pad = model.config.eos_token_id or 0

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return pairs_together(rows)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        # transformers reads the last token that is not padding; where padding and end token are one, that is the token before
        ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], self._pad)
        return {"input_ids": ids, "attention_mask": batch["attention_mask"]}

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        rewards = model(**self.inputs(batch)).logits[:, 0].float()
        chosen, rejected = rewards.chunk(2)
        losses = -F.logsigmoid(chosen - rejected)[:, None] * (batch["labels"][:, 1:] != IGNORE)
        return Outputs(losses.detach(), (losses * weights).sum(), (chosen - rejected)[:, None].detach())

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        used = batch["labels"][:, 1:] != IGNORE
        assert outputs.logits is not None
        return {"accuracy": (float(((outputs.logits > 0) & used).sum()), float(used.sum()))}


def pairs_together(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of B pairs: input_ids (2B, T), the chosen answers first; `answer` (2B, T) bool marks the answers' tokens.

    labels (B, 2): one target a pair; `real` (2B, T).
    """
    none = torch.zeros(0, dtype=torch.long)  # a row that fills up a batch
    both = [(r.get(k, none)[: int(r["length"])], int(r.get(f"{k}_from", 0))) for k in ("chosen", "rejected") for r in rows]
    ids, real = _padded([t for t, _ in both], 0), _padded([torch.ones_like(t) for t, _ in both], 0)
    used = torch.tensor([r["example_id"] >= 0 for r in rows])
    labels = torch.where(used, 0, IGNORE)[:, None]
    begin = torch.tensor([n for _, n in both])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": torch.where(real.any(1, keepdim=True), real, torch.ones_like(real)),
        "answer": real.bool() & (torch.arange(ids.shape[1]) >= begin),
        "labels": torch.cat([torch.full_like(labels, IGNORE), labels], 1),
        "real": real.bool(),
        "example_id": torch.tensor([r["example_id"] for r in rows]),
    }


def _padded(values: list[Tensor], fill: int) -> Tensor:
    longest = max(1, *(len(v) for v in values))
    out = torch.full((len(values), longest), fill, dtype=torch.long)
    for i, v in enumerate(values):
        out[i, : len(v)] = v
    return out


def objective_class(model: Any) -> type[Objective]:
    """What a model learns from, by its class. UserError where it has no head for any of it."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ours = type(core).__name__
    for family, objective in (
        (AutoModelForSeq2SeqLM, PairsOfTexts),
        (AutoModelForCausalLM, NextToken),
        (AutoModelForMaskedLM, MaskedTokens),
        (AutoModelForSequenceClassification, RankedPairs),
    ):
        known = family._model_mapping.get(type(core.config), None)
        classes = known if isinstance(known, (list, tuple)) else (known,)
        if any(c is not None and (isinstance(core, c) or c.__name__ == ours.removeprefix("FSDP")) for c in classes):
            if objective is RankedPairs and core.config.num_labels != 1:
                raise UserError(f"{ours} sorts texts into {core.config.num_labels} classes", "a reward model has one", "give num_labels 1")
            return objective  # type: ignore[return-value]
    raise UserError(
        f"{ours} has no head to be trained with",
        "it is neither a language model, a masked one, an encoder-decoder nor a reward model",
        "give a checkpoint whose config names such a class in `architectures`",
    )
