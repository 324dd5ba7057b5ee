"""The only training loop: transformers' Trainer with exact loss normalisation, and the contract of a training method.

A Technique has five optional parts: an attachment, a selector, a data policy, loss terms, an update rule. A loss term
returns a sum and a count, never a mean; sums are divided by the count over the whole accumulation window and all
processes, so 4 x 2 accumulation is 1 x 8 whatever the padding.
"""

import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback, TrainingArguments

from modelwright.core import dist
from modelwright.core.anatomy import Anatomy
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.recorder import Recorder
from modelwright.core.text import IGNORE, Rows, collate

COMPLETE = "complete.json"  # written last: a state without it was cut off while being saved
_RECOMPUTE = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in TrainingArguments.__dataclass_fields__)
_KEPT = 2  # resumable states
Named = Iterable[tuple[str, nn.Parameter]]


class LossTerm:
    """Next-token cross-entropy, and the shape of every other term: `count` from the batch alone, `sums` per example."""

    name, weight = "lm", 1.0

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """What the sum is divided by, over window and processes: here the learnt tokens."""
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """Summed loss of each example, (B,)."""
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view_as(labels).sum(1)


class Technique:
    """A training-time method. Override what it changes; everything else stays plain training."""

    name = "full"
    supports = frozenset({"ddp", "fsdp2", "fused", "gradient_checkpointing", "lora"})

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        """Attachment: add modules, before anything is wrapped. Returns the model to train."""
        return model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        """Selector: set requires_grad, before the optimizer exists."""

    def prepare(self, rows: Rows) -> Rows:
        """Data policy."""
        return rows

    def terms(self) -> list[LossTerm]:
        """Loss terms added to the sum."""
        return []

    def on_gradients(self, named: Named) -> None:
        """Update rule: edit gradients, once per optimizer step, before clipping."""

    def after_step(self, named: Named) -> None:
        """Update rule: act on the weights after the optimizer's step."""

    def liveness(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
        """A sentence that proves the method did something in the first step; raises RuntimeError when it did not."""
        moved = sum(not torch.equal(before[n], after[n]) for n in after)
        if not moved:
            raise RuntimeError(f"{self.name}: no weight moved in the first step")
        return f"{moved} of {len(after)} trained tensors moved in the first step"

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors needed to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of state_dict."""

    def export(self, model: Any, folder: Path) -> Any:
        """The plain model to save; may write extra files into `folder`."""
        return model


@dataclass
class Outcome:
    """What a training run gives besides the trained model."""

    steps: int
    tokens: int
    evals: list[dict[str, Any]] = field(default_factory=list)  # step, name, loss (nats per token), bits_per_byte
    liveness: list[str] = field(default_factory=list)
    energy_j: float | None = None
    energy_source: str = "unknown"
    dynamics: Path | None = None
    model: Any = None

    def at(self, name: str, last: bool = True) -> dict[str, Any]:
        """The first or last evaluation of one held-out text."""
        return [e for e in self.evals if e["name"] == name][-1 if last else 0]


class Trainer(HFTrainer):
    """transformers.Trainer with techniques, exact normalisation, a recorder, and states that are marked when whole."""

    def __init__(self, *, techniques: list[Technique], recorder: Recorder | None, on_save: Callable[[], dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self.techniques, self.recorder, self.on_save = techniques, recorder, on_save
        self.terms = [LossTerm(), *(t for q in techniques for t in q.terms())]
        self.loss_is_scaled_for_ga = True
        self.lr_used, self.tokens = 0.0, 0
        self._counts: dict[str, Tensor] = {}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if batches:
            local = [torch.stack([t.count(b) for b in batches]).sum() for t in self.terms]
            real = [b["attention_mask"].sum() if "attention_mask" in b else torch.tensor(b["input_ids"].numel()) for b in batches]
            *counts, seen = dist.sum_over_ranks(*local, torch.stack(real).sum())
            self._counts = dict(zip([t.name for t in self.terms], counts, strict=True))
            self.tokens += int(seen)
        return batches, None

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        self.lr_used = self._get_learning_rate()
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False)
        total: Any = 0.0
        for term in self.terms:
            sums = term.sums(inputs, outputs)
            count = self._counts[term.name].to(sums.device)
            if self.recorder and term.name == "lm":
                learnt = (inputs["labels"][:, 1:] != IGNORE).sum(1)
                self.recorder.train(self.state.global_step + 1, self.lr_used, inputs["example_id"], sums, learnt)
            total = total + term.weight * sums.sum() / count.clamp(min=1)
        total = total * dist.world()  # DDP and FSDP average gradients over processes; the count is already global
        return (total, outputs) if return_outputs else total

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for t in self.techniques:
            t.on_gradients(model.named_parameters())
        return super()._clip_grad_norm(model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            torch.save([t.state_dict() for t in self.techniques], folder / "techniques.pt")
            if self.recorder:
                self.recorder.flush(self.state.global_step)
            part = folder / (COMPLETE + ".tmp")
            part.write_text(json.dumps(self.on_save() | {"step": self.state.global_step}))
            part.replace(folder / COMPLETE)
            for old in sorted(folder.parent.glob("checkpoint-*"), key=_step)[:-_KEPT]:
                (old / COMPLETE).unlink(missing_ok=True)  # unmarked first: a state half removed is no state
                shutil.rmtree(old)


class _Loop(TrainerCallback):
    """Progress, evaluation, liveness and a graceful Ctrl-C."""

    def __init__(
        self,
        techniques: list[Technique],
        evaluate: Callable[[int], None],
        every: int,
        tick: Callable[[int, int], None],
        outcome: Outcome,
        lr: Callable[[], float],
    ):
        self.techniques, self.evaluate, self.every, self.tick, self.outcome, self.lr = techniques, evaluate, every, tick, outcome, lr
        self.interrupted = False
        self._before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.evaluate(0)
        if not self.outcome.liveness:
            self._before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for t in self.techniques:
            t.after_step(model.named_parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._before and self.lr() > 0:  # the first step of a warm-up has learning rate 0
            after = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            self.outcome.liveness = [t.liveness(self._before, after) for t in self.techniques]
            self._before = {}
        self.tick(state.global_step, state.max_steps)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


@torch.no_grad()
def evaluate_rows(model: Any, rows: Rows, batch: int) -> dict[str, float]:
    """Mean next-token loss in nats, and bits per byte of the text (tokens per byte of the whole times bits per token)."""
    training, term = model.training, LossTerm()
    model.eval()
    total, count = 0.0, 0
    for i in range(0, len(rows), batch):
        b = {k: v.to(model.device) for k, v in collate([rows[j] for j in range(i, min(i + batch, len(rows)))]).items()}
        out = model(input_ids=b["input_ids"], attention_mask=b.get("attention_mask"), use_cache=False)
        total, count = total + float(term.sums(b, out).sum()), count + int(term.count(b))
    model.train(training)
    loss = total / max(count, 1)
    return {"loss": loss, "tokens": count} | ({"bits_per_byte": loss / math.log(2) * rows.tokens / rows.bytes} if rows.bytes else {})


def steps_for(rows: Rows, train: Train) -> int:
    """Optimizer steps for a token budget or a number of passes."""
    per_epoch = math.ceil(math.ceil(len(rows) / (train.batch * dist.world())) / train.accumulate)
    if not train.tokens:
        return max(1, math.ceil(train.epochs * per_epoch - 1e-9))
    passes, rest = divmod(train.tokens, rows.tokens)
    return max(1, passes * per_epoch + math.ceil(rest * len(rows) / rows.tokens / (train.batch * train.accumulate * dist.world())))


def _step(state: Path) -> int:
    return int(state.name.split("-")[1])


def latest_state(folder: Path) -> Path | None:
    """The newest resumable state that was saved whole."""
    found = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).is_file()]
    return max(found, key=_step, default=None)


def fit(
    model: Any,
    rows: Rows,
    train: Train,
    *,
    techniques: list[Technique],
    evals: dict[str, Rows],
    folder: Path,
    seed: int,
    tick: Callable[[int, int], None] = lambda step, of: None,
) -> Outcome:
    """Train `model` on `rows`; resumes by itself from the newest whole state in `folder`, bit-equal to an unbroken run.

    Raises UserError for an encoder-decoder model or a loss that is not finite. Returns the outcome; `outcome.model` is the
    trained model, adapters attached.
    """
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} has an encoder and a decoder", "plain text has no input and target for it", "give a decoder-only model"
        )
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    if limit and rows.ids.shape[1] > limit:
        raise UserError(f"context={rows.ids.shape[1]} is longer than the model's {limit} positions", how="lower train.context")
    torch.manual_seed(seed)
    anatomy = Anatomy(model)
    for t in techniques:
        model = t.attach(model, anatomy)
    for t in techniques:
        t.select(model, anatomy, seed)
        rows = t.prepare(rows)
    steps = steps_for(rows, train)
    if dist.rank() == 0:
        for cut_off in [p for p in folder.glob("checkpoint-*") if not (p / COMPLETE).is_file()]:
            shutil.rmtree(cut_off)
    state = latest_state(folder)
    done = _step(state) if state else 0
    recorder = Recorder(folder / "dynamics.parquet", done) if train.record and dist.rank() == 0 else None
    outcome = Outcome(steps, 0, model=model)
    if state:
        saved = json.loads((state / COMPLETE).read_text())
        outcome.evals, outcome.liveness = saved["evals"], saved["liveness"]
        for t, s in zip(techniques, torch.load(state / "techniques.pt", weights_only=True), strict=True):
            t.load_state_dict(s)
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        warmup_steps=round(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip or math.inf,  # without a limit transformers would skip the hook that edits gradients
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=train.save_every,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not cuda,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
    )
    setattr(args, _RECOMPUTE, train.gradient_checkpointing)

    def evaluate(step: int) -> None:
        for name, held_out in evals.items():
            result = evaluate_rows(trainer.model, held_out, train.batch)
            if not math.isfinite(result["loss"]):
                for useless in folder.glob("checkpoint-*"):
                    shutil.rmtree(useless)
                raise UserError("the loss is not finite", f"training diverged by step {step}", f"lower train.lr (now {train.lr})")
            outcome.evals.append({"step": step, "name": name, **result})
            if recorder:
                recorder.eval(step, name, result["loss"], int(result["tokens"]))

    loop = _Loop(techniques, evaluate, train.eval_every or max(1, steps // 10), tick, outcome, lambda: trainer.lr_used)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        techniques=techniques,
        recorder=recorder,
        on_save=lambda: {"evals": outcome.evals, "liveness": outcome.liveness, "tokens": trainer.tokens},
        callbacks=[loop],
    )
    trainer.tokens = saved["tokens"] if state else 0
    for name in ("PrinterCallback", "ProgressCallback"):
        for c in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == name]:
            trainer.remove_callback(c)
    if state and done >= steps:  # trained to the end, then stopped before the result was published
        trainer._load_from_checkpoint(str(state))
    else:
        with _graceful(loop):
            trainer.train(resume_from_checkpoint=str(state) if state else None)
    if loop.interrupted and trainer.state.global_step < steps:
        raise KeyboardInterrupt
    outcome.tokens = trainer.tokens
    if not outcome.liveness:
        raise UserError(
            "nothing was trained",
            f"the learning rate was never above zero in {steps} steps",
            "raise train.lr, lower train.warmup or train longer",
        )
    if recorder:
        outcome.energy_j, outcome.energy_source = recorder.meter.joules(), recorder.meter.source
        outcome.dynamics = recorder.close(steps)
    return outcome


class _graceful:
    """The first Ctrl-C ends the step, saves a resumable state and stops; the second stops at once."""

    def __init__(self, loop: _Loop):
        self.loop = loop

    def __enter__(self) -> None:
        self.usable = threading.current_thread() is threading.main_thread()
        if self.usable:
            self.before = signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        if self.loop.interrupted:
            raise KeyboardInterrupt
        self.loop.interrupted = True

    def __exit__(self, *error: object) -> None:
        if self.usable:
            signal.signal(signal.SIGINT, self.before)
