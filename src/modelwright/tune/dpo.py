"""DPO, Direct Preference Optimization (2305.18290): learn from pairs of answers without a reward model.

What for: to make chosen answers likelier than rejected ones while the model stays near the one that it starts from. With
    h = log pi(y+ | x) / pi_ref(y+ | x)  -  log pi(y- | x) / pi_ref(y- | x)
the loss of a pair is
    dpo            -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)       s: label smoothing (cDPO), the chance of a wrong label
    ipo            (h - 1 / (2 beta))^2, each log-ratio divided by the tokens of its answer (2310.12036; its authors confirmed that to TRL)
    hinge          max(0, 1 - beta h)                                          (SLiC, 2305.10425)
`per_token` divides each log-ratio by the tokens of its answer in the other two losses as well, so that beta is of another size.

The reference is the model before the step, or the checkpoint `reference`. Its log-probabilities are computed once, before training, and
kept on disk by a fingerprint of model and pairs; no second model is held while training. The loss at the start is ln 2 for dpo. Dropout is
off, as in TRL: a reference without dropout would not be the model's own.

Pairs are `chosen` and `rejected`, with or without `prompt`, texts or conversations; equal ones and those longer than the context are left
out and counted. The policy's logits are computed over chunks of tokens and computed again in the backward pass, never held whole.
The paper's: beta 0.1, batch 64, RMSprop at 1e-6 with a linear warm-up of 150 steps; here AdamW.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modelwright.core.data.make import make_rows
from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.data.store import cache_folder, store_key
from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist
from modelwright.core.train.head import ChunkedHead
from modelwright.core.train.objective import NextToken, Objective, Outputs, objective_class, pairs_together
from modelwright.core.train.technique import Technique

_CHUNK = 1 << 25  # logits held at a time: 128 MB in fp32


@dataclass(frozen=True)
class Knobs(Tune):
    beta: float = knob(0.1, "how strongly the model is held to the reference; of ipo: its tau", low=1e-6)
    loss: Literal["dpo", "ipo", "hinge"] = knob("dpo", "loss of a pair")
    label_smoothing: float = knob(0.0, "dpo: share of pairs that are expected to be labelled wrongly", low=0, high=0.499)
    per_token: bool = knob(False, "divide log-ratios by the tokens of their answer (ipo always does)")
    reference: str | None = knob(None, "checkpoint to stay near; empty: the model before this step", path=True)


# ---- the loss ----------------------------------------------------------------------------------------------------------
def preference_loss(ratios: Tensor, lengths: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """Loss and h of each pair, (B,) both, from the log-ratios (2B,) of chosen and then rejected answers and their lengths in tokens."""
    if knobs.per_token or knobs.loss == "ipo":
        ratios = ratios / lengths.clamp(min=1)
    h = ratios.chunk(2)[0] - ratios.chunk(2)[1]
    if knobs.loss == "ipo":
        return (h - 1 / (2 * knobs.beta)).square(), h
    if knobs.loss == "hinge":
        return F.relu(1 - knobs.beta * h), h
    s = knobs.label_smoothing
    return -(1 - s) * F.logsigmoid(knobs.beta * h) - s * F.logsigmoid(-knobs.beta * h), h


class DifferentiableHead(ChunkedHead):
    """Losses of single tokens over chunks, with a gradient: each chunk's logits are computed again in the backward pass."""

    def _losses(self, output: Any, states: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        size = max(1, _CHUNK // int(self.core.config.get_text_config().vocab_size))

        def loss(part: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(output, part).float(), targets, reduction="none")

        pieces = [(states[i : i + size], labels[i : i + size]) for i in range(0, len(states), size)]
        flat = [checkpoint(loss, *p, use_reentrant=False) if torch.is_grad_enabled() else loss(*p) for p in pieces]
        found = torch.cat(flat) if flat else states.new_zeros(0, dtype=torch.float32)
        return (found * weights).sum(), found


class Preferences(Objective):
    """The loss of pairs, each beside the reference's log-probabilities."""

    kind, name, unit = "ranked", "preferences", "loss per pair"

    def __init__(self, model: Any, tokenizer: Any, seed: int, knobs: Knobs):
        super().__init__(model, tokenizer, seed)
        self.knobs = knobs

    def install(self, model: Any) -> None:
        self.head = None if self.whole_logits else DifferentiableHead.install(model)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        nothing = torch.zeros(0, dtype=torch.long)  # a row that only fills the batch up
        rows = [r if "chosen" in r else r | {"chosen": nothing, "rejected": nothing} for r in rows]
        reference = torch.stack([r.get("reference", torch.zeros(2)) for r in rows])  # (B, 2)
        return pairs_together(rows) | {"reference": reference.T.flatten()}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask")} | {"use_cache": False}

    def states(self, hidden: Tensor) -> Tensor:
        return hidden[:, :-1]

    def log_probabilities(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of each answer behind its prompt, (2B,)."""
        labels = torch.where(batch["answer"], batch["input_ids"], IGNORE)[:, 1:]
        if self.head is not None:
            losses, _ = model(**self.inputs(batch), loss_of=(labels, torch.ones_like(labels), self.states))
        else:
            logits = self.states(model(**self.inputs(batch)).logits)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
        return -losses.sum(1)

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> Outputs:
        ratios = self.log_probabilities(model, batch) - batch["reference"]
        each, h = preference_loss(ratios, batch["answer"][:, 1:].sum(1), self.knobs)
        losses = each[:, None] * (batch["labels"][:, 1:] != IGNORE)
        return Outputs(losses.detach(), (losses * weights).sum(), h[:, None].detach())

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        used = batch["labels"][:, 1:] != IGNORE
        assert outputs.logits is not None
        count = float(used.sum())
        return {
            "accuracy": (float(((outputs.logits > 0) & used).sum()), count),
            "margin": (float((outputs.logits * used).sum()) * self.knobs.beta, count),
        }


# ---- the reference -----------------------------------------------------------------------------------------------------
class ReferencedRows(TokenRows):
    """Rows of pairs with `reference` (2,): the reference's log-probabilities of the chosen and the rejected answer."""

    def __init__(self, rows: TokenRows, reference: Tensor):
        self.rows, self.reference = rows, reference
        self.bytes, self.facts, self.stops, self.width, self.packed = rows.bytes, rows.facts, rows.stops, rows.width, rows.packed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i] | {"reference": self.reference[i]}

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    def split(self, at: int) -> tuple["ReferencedRows", "ReferencedRows"]:
        a, b = self.rows.split(at)
        return ReferencedRows(a, self.reference[:at]), ReferencedRows(b, self.reference[at:])


@torch.no_grad()
def reference_of(model: Any, objective: Preferences, rows: TokenRows, batch: int) -> Tensor:
    """Log-probabilities (N, 2) of all answers; several processes share the rows."""
    if torch.cuda.is_available():
        model.to(f"cuda:{torch.cuda.current_device()}")
    training, found = model.training, torch.zeros(len(rows), 2, dtype=torch.float64)
    model.eval()
    objective.install(model)
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
            for i in range(batch * dist.rank(), len(rows), batch * dist.world()):
                part = objective.collate([rows[j] for j in range(i, min(i + batch, len(rows)))])
                part = {k: v.to(model.device) for k, v in part.items()}
                found[i : i + batch] = objective.log_probabilities(model, part).view(2, -1).T.double().cpu()
    finally:
        objective.remove()
        model.train(training)
    return dist.all_sum(found).float()


def digest(rows: TokenRows) -> str:
    """A fingerprint of the pairs' tokens."""
    whole = hashlib.sha256()
    for i in range(len(rows)):
        row = rows[i]
        for name in ("chosen", "rejected"):
            whole.update(np.asarray(row[name], np.int64).tobytes() + f"|{row[f'{name}_from']}|".encode())
    return whole.hexdigest()


class Dpo(Technique):
    """Brings the objective, and rows that carry the reference's log-probabilities."""

    name = "dpo"

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.model: Any = None
        self.kept = 0  # log-probabilities that were on disk already
        self.computed = 0

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Preferences:
        if objective_class(model) is not NextToken:
            raise UserError(f"{type(model).__name__} does not go on with a text", "dpo compares the answers that a model gives", "give one")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.model = model
        return Preferences(model, tokenizer, seed, self.knobs)

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows | None:
        if not data.path and not data.sources:
            return None  # the loop says that there is no data
        rows = make_rows(data, tokenizer, vocab, train.context, kind="ranked", seed=seed)
        if self.model.device.type == "meta":  # a preview
            return rows
        return ReferencedRows(rows, self._reference(rows, train, seed))

    def _reference(self, rows: TokenRows, train: Train, seed: int) -> Tensor:
        source = Checkpoint(self.knobs.reference) if self.knobs.reference else self.source
        kind = next(self.model.parameters()).dtype
        file = (
            cache_folder() / f"reference-{store_key('dpo', source.fingerprint(), digest(rows), str(kind), torch.cuda.is_available())}.npy"
        )
        there = file.is_file()
        dist.barrier()
        if there:
            os.utime(file)
            self.kept += 2 * len(rows)
            return torch.from_numpy(np.load(file))
        model = source.model(kind) if self.knobs.reference else self.model
        if self.knobs.reference and model.config.get_text_config().vocab_size != self.model.config.get_text_config().vocab_size:
            raise UserError(
                f"{self.knobs.reference} has another vocabulary", "its log-probabilities are of other tokens", "give a relative"
            )
        found = reference_of(model, Preferences(model, None, seed, self.knobs), rows, train.batch)
        if not bool(found.isfinite().all()):
            raise UserError("the reference gives log-probabilities that are not finite", "its weights or the data are damaged")
        self.computed += 2 * len(rows)
        if dist.rank() == 0:
            _keep(file, found)
        return found

    def facts(self) -> dict[str, Any]:
        return {"reference log-probabilities computed": self.computed, "found on disk": self.kept}


def _keep(file: Path, values: Tensor) -> None:
    """Write the file under its name in one step."""
    part = file.with_suffix(f".{os.getpid()}.part")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            np.save(handle, values.numpy())
        os.replace(part, file)


METHOD = Dpo
