"""A model scores answers: s_i = mean log-likelihood of the tokens of answer i, p = softmax over the answers, the loss -log p(right one).

One pass of the model reads a batch of questions and every answer to each. With a rationale the answer may be kept from reading it
(`bottleneck`): an encoder-decoder's cross-attention sees the question's states alone; in a decoder-only model the sequence is
[rationale; question; cue; answer], and cue and answer see question, cue and answer alone.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.rows import IGNORE
from modelwright.core.errors import UserError
from modelwright.core.train.objective import Objective, Outputs
from modelwright.tune.choices.rows import CUE


@dataclass
class ChoiceOutputs(Outputs):
    """scores (B, C), -inf where a question has fewer answers; states of the question (B, X, d) and of the answers (B, C, L, d).

    The question's states are what the answer reads deepest: the encoder's output, or the input of the last block of a decoder.
    """

    scores: Tensor | None = None
    x_states: Tensor | None = None
    y_states: Tensor | None = None


class ChoiceScores(Objective):
    """Learn to score the right answer highest. `rationale`: the input holds it; where `absent`, not in evaluation.

    story: the one answer given is learnt token by token instead.
    """

    kind, name, unit = "pairs", "choices", "nats per question"

    def __init__(self, model: Any, tokenizer: Any, *, rationale: bool, bottleneck: bool, absent: bool = False, story: bool = False):
        super().__init__(model, tokenizer)
        self.rationale, self.bottleneck, self.absent, self.story = rationale, bottleneck, absent, story
        self.pairs = bool(model.config.is_encoder_decoder)
        self.pad = getattr(model.config, "pad_token_id", None) or 0
        start = getattr(model.config, "decoder_start_token_id", None)
        self.cue = [self.pad if start is None else start] if self.pairs else list(tokenizer(CUE, add_special_tokens=False)["input_ids"])

    # ---- batches -------------------------------------------------------------------------------------------------------
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """x (B, X), r (B, R), the decoder's y and targets (B, C, L), all filled up at the end; labels (B, 2) hold one target a question."""
        xs = [r["input_ids"][: int(r["length"])] for r in rows]
        rs = [r["rationale"] if self.rationale and "rationale" in r else xs[0][:0] for r in rows]
        answers = [r.get("answers", []) for r in rows]
        b, c = len(rows), max(1, *map(len, answers))
        longest = max((len(y) for ys in answers for y in ys), default=1)
        given = torch.full((b, c, len(self.cue) + longest - 1), self.pad)
        targets = torch.full_like(given, IGNORE)
        for i, ys in enumerate(answers):
            for k, y in enumerate(ys):
                n = len(self.cue)
                given[i, k, : n + len(y) - 1] = torch.cat([torch.tensor(self.cue), y[:-1]])
                targets[i, k, n - 1 : n - 1 + len(y)] = y
        gold = torch.tensor([int(r.get("gold", 0)) if r["example_id"] >= 0 else IGNORE for r in rows])[:, None]
        x_real, r_real = (_real(v) for v in (xs, rs))
        return {
            "x": _filled(xs, self.pad),
            "x_real": x_real,
            "r": _filled(rs, self.pad)[:, : r_real.shape[1]],
            "r_real": r_real,
            "y": given,
            "targets": targets,
            "labels": torch.cat([torch.full_like(gold, IGNORE), gold], 1),
            "real": torch.cat([x_real, (targets != IGNORE).flatten(1)], 1),
            "example_id": torch.tensor([r["example_id"] for r in rows]),
        }

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("x", "x_real", "r", "r_real", "y", "targets")}

    # ---- the model -----------------------------------------------------------------------------------------------------
    def install(self, model: Any) -> None:
        """The model's own forward is called through ours, so that wrappers (DDP, FSDP) see one call a batch."""
        self.core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.plain, self.own = self.core.forward, self.core.__dict__.get("forward")
        kind = getattr(self.core.config, "_attn_implementation", None)
        if not self.pairs and kind not in ("sdpa", "eager"):
            raise UserError(f"a rationale cannot be hidden under {kind}", "it takes no mask of pairs", "set train.attention: sdpa")
        self.additive = kind == "eager"  # which adds its mask to the scores; sdpa takes a boolean one
        self.shortens = "logits_to_keep" in inspect.signature(self.plain).parameters
        self.core.forward = self._forward

    def remove(self) -> None:
        if self.own is None:
            del self.core.forward
        else:
            self.core.forward = self.own

    def _forward(self, *args: Any, x: Tensor | None = None, **given: Any) -> Any:
        if x is None:
            return self.plain(*args, **given)
        return (self._pair if self.pairs else self._sequence)(x, **given)

    def _pair(self, x: Tensor, x_real: Tensor, r: Tensor, r_real: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States of the question, states and logits of the answers."""
        ids, real = _joined(x, x_real, r, r_real, self.pad)
        seen = real & (torch.arange(ids.shape[1], device=ids.device) < x_real.sum(1, keepdim=True)) if self.bottleneck else real
        full, seen = (m | (~m.any(1, keepdim=True) & (torch.arange(ids.shape[1], device=ids.device) == 0)) for m in (real, seen))
        encoded = self.core.get_encoder()(input_ids=ids, attention_mask=full.long())
        c = y.shape[1]
        encoded_each = type(encoded)(last_hidden_state=encoded[0].repeat_interleave(c, 0))
        out = self.plain(
            encoder_outputs=encoded_each,
            attention_mask=seen.long().repeat_interleave(c, 0),
            decoder_input_ids=y.flatten(0, 1),
            use_cache=False,
            output_hidden_states=True,
        )
        return encoded[0][:, : x.shape[1]], out.decoder_hidden_states[-1].unflatten(0, y.shape[:2]), out.logits.unflatten(0, y.shape[:2])

    def _sequence(self, x: Tensor, x_real: Tensor, r: Tensor, r_real: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = y.shape[1], x.shape[1]
        steps = torch.arange(y.shape[2], device=y.device)
        last = torch.where(targets != IGNORE, steps, -1).amax(2, keepdim=True)
        real = torch.cat([*(m[:, None].expand(-1, c, -1) for m in (r_real, x_real)), steps <= last], 2).flatten(0, 1)  # (B * C, T)
        ids = torch.cat([*(m[:, None].expand(-1, c, -1) for m in (r, x)), y], 2).flatten(0, 1)
        size = x_real.sum(1)  # the student's places are those of [question; answer]; a rationale takes the ones after them
        after = size + last.amax((1, 2)) + 1
        places = torch.cat(
            [
                (after[:, None] + torch.arange(r.shape[1], device=r.device))[:, None].expand(-1, c, -1),
                torch.arange(n, device=x.device).expand(len(x), c, -1),
                (size[:, None] + steps)[:, None].expand(-1, c, -1),
            ],
            2,
        ).flatten(0, 1)
        keep = {"logits_to_keep": y.shape[2]} if self.shortens else {}
        mask = self.mask(real, r.shape[1], r.shape[1] + n)
        out = self.plain(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=False,
            output_hidden_states=True,
            **keep,
        )
        shape = y.shape[:2]
        question = out.hidden_states[-2][:, r.shape[1] : r.shape[1] + n].unflatten(0, shape)[:, 0]
        return question, out.hidden_states[-1][:, -y.shape[2] :].unflatten(0, shape), out.logits[:, -y.shape[2] :].unflatten(0, shape)

    def mask(self, real: Tensor, x_from: int, y_from: int) -> Tensor:
        """Which token (T) sees which (T), (N, 1, T, T): itself and those before it; under the bottleneck no answer sees a rationale."""
        at = torch.arange(real.shape[1], device=real.device)
        sees = at <= at[:, None]
        if self.bottleneck:
            sees = sees & ~((at[:, None] >= y_from) & (at < x_from))
        whole = (sees & real[:, None, None]) | (at == at[:, None])
        return torch.where(whole, 0.0, torch.finfo(torch.float32).min) if self.additive else whole

    def forward(self, model: Any, batch: dict[str, Tensor], weights: Tensor) -> ChoiceOutputs:
        given = self.inputs(batch)
        if self.absent and not model.training:
            given |= {k: given[k][:, :0] for k in ("r", "r_real")}
        x_states, y_states, logits = model(**given)
        scores, labels = scores_of(logits, batch["targets"]), batch["labels"][:, 1:]
        used = labels[:, 0] != IGNORE
        if self.story:
            losses = torch.where(used, -scores[:, 0], 0.0)
        else:
            losses = F.cross_entropy(torch.where(used[:, None], scores, 0.0), labels[:, 0], ignore_index=IGNORE, reduction="none")
        losses = losses[:, None]
        return ChoiceOutputs(losses.detach(), (losses * weights).sum(), None, scores, x_states, y_states)

    def further(self, batch: dict[str, Tensor], outputs: Outputs) -> dict[str, tuple[float, float]]:
        if self.story:
            return {}
        labels = batch["labels"][:, 1]
        assert isinstance(outputs, ChoiceOutputs) and outputs.scores is not None
        right = (outputs.scores.argmax(1) == labels) & (labels != IGNORE)
        return {"accuracy": (float(right.sum()), float((labels != IGNORE).sum()))}


def scores_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean log-likelihood of each answer (B, C) from logits (B, C, L, V); -inf where there is none."""
    nats = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)
    count = (targets != IGNORE).sum(2)
    return torch.where(count > 0, -nats.sum(2) / count.clamp(min=1), float("-inf"))


def _filled(values: list[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([v.long() for v in values], batch_first=True, padding_value=fill)


def _real(values: list[Tensor]) -> Tensor:
    return _filled([torch.ones_like(v) for v in values], 0).bool()


def _joined(x: Tensor, x_real: Tensor, r: Tensor, r_real: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """[x; r] without a gap between them, filled up at the end, and which places are real."""
    ids, real = torch.cat([x, r], 1), torch.cat([x_real, r_real], 1)
    order = (~real).long().argsort(dim=1, stable=True)
    return torch.where(real.gather(1, order), ids.gather(1, order), pad), real.gather(1, order)
