"""The only training loop: any techniques, one process or many, resumed bit for bit.

DDP is the Trainer's own. FSDP2 is applied here: the Trainer's path to it
falls back to DDP without a word where there is no GPU.
"""

import json
import math
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyarrow import concat_tables, parquet
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from modelwright.core.data.rows import Filled, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist
from modelwright.core.train.recorder import Recorder
from modelwright.core.train.technique import LossTerm, Technique, combine, marks, movement, surroundings
from modelwright.core.train.trainer import COMPLETE, Trainer, forward, step_of

_RECOMPUTE = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in TrainingArguments.__dataclass_fields__)


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
    facts: dict[str, Any] = field(default_factory=dict)  # by technique
    model: Any = None  # on every process the trained model; under FSDP2 whole on the first and None on the others

    def at(self, name: str, last: bool = True) -> dict[str, Any]:
        """The first or last evaluation of one held-out text."""
        return [e for e in self.evals if e["name"] == name][-1 if last else 0]


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
        self.named: Callable[[], list] = list

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.evaluate(0)
        if not self.outcome.liveness:
            self._before = marks(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for t in self.techniques:
            t.after_step(self.named())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._before and self.lr() > 0:  # the first step of a warm-up has learning rate 0
            moved = movement(model, self._before)
            self.outcome.liveness = [t.liveness(moved) for t in self.techniques]
            self._before = {}
        self.tick(state.global_step, state.max_steps)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)
        if dist.any_of(self.interrupted):
            self.interrupted = True
            control.should_save = control.should_training_stop = True


@torch.no_grad()
def evaluate_rows(model: Any, rows: Rows, batch: int) -> dict[str, float]:
    """Mean next-token loss in nats, and bits per byte of the text (tokens per byte of the whole times bits per token).

    Weights of the rows say what counts, not how much. Several processes share the batches.
    """
    training, term = model.training, LossTerm()
    model.eval()
    full = Filled(rows, batch * dist.world())
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in range(batch * dist.rank(), len(full), batch * dist.world()):
        b = {k: v.to(model.device) for k, v in collate([full[j] for j in range(i, i + batch)]).items()}
        b.pop("weights", None)
        total += term.sums(b, forward(model, b)).sum().cpu()
        count += term.count(b).cpu()
    dist.reshard(model)
    model.train(training)
    total, count = dist.sum_over_ranks(total, count)
    loss = float(total) / max(float(count), 1)
    bits = {"bits_per_byte": loss / math.log(2) * rows.tokens / rows.bytes} if rows.bytes else {}
    return {"loss": loss, "tokens": int(count)} | bits


def steps_for(rows: Rows, train: Train) -> int:
    """Optimizer steps for a token budget or a number of passes."""
    per_epoch = math.ceil(math.ceil(len(rows) / (train.batch * dist.world())) / train.accumulate)
    if not train.tokens:
        return max(1, math.ceil(train.epochs * per_epoch - 1e-9))
    passes, rest = divmod(train.tokens, rows.tokens)
    return max(1, passes * per_epoch + math.ceil(rest * len(rows) / rows.tokens / (train.batch * train.accumulate * dist.world())))


def latest_state(folder: Path) -> Path | None:
    """The newest resumable state that was saved whole."""
    found = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).is_file()]
    return max(found, key=step_of, default=None)


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
    techniques = techniques or [Technique()]
    combine(techniques, surroundings(model, train))
    torch.manual_seed(seed)
    anatomy = Anatomy(model)
    blocks = [b.module for b in anatomy.blocks]
    for t in techniques:
        model = t.attach(model, anatomy)
    for t in techniques:
        t.select(model, anatomy, seed)
        rows = t.prepare(rows)
    combine(techniques, surroundings(model, train))  # what edits gradients is known only now
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{' and '.join(t.name for t in techniques)} leave nothing to train", "every weight is frozen", "loosen one")
    if rows.segments is not None:
        require_apart(model)
    sharded, empty = dist.world() > 1 and train.strategy == "fsdp2", None
    if sharded:
        model.to(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
        empty = dist.emptied(model)
        dist.shard(model, blocks)
    steps = steps_for(rows, train)
    if dist.rank() == 0:
        for cut_off in [p for p in folder.glob("checkpoint-*") if not (p / COMPLETE).is_file()]:
            shutil.rmtree(cut_off)
    dist.barrier()
    state = latest_state(folder)
    done = step_of(state) if state else 0
    recorder = Recorder(_dynamics(folder, dist.rank()), done) if train.record else None
    outcome = Outcome(steps, 0, model=model)
    if state:
        saved = json.loads((state / COMPLETE).read_text())
        if saved["processes"] != dist.world():
            before = saved["processes"]
            raise UserError(f"the run in {folder} was begun with {before} processes", f"now there are {dist.world()}", f"use {before}")
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
        ddp_backend="gloo" if dist.world() > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
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
        train_dataset=Filled(rows, train.batch * train.accumulate * dist.world()),
        data_collator=collate,
        techniques=techniques,
        recorder=recorder,
        on_save=lambda: {"evals": outcome.evals, "liveness": outcome.liveness, "tokens": trainer.tokens},
        callbacks=[loop],
    )
    loop.named = trainer._named
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
    outcome.facts = {t.name: f for t in techniques if (f := t.facts())}
    if recorder:
        outcome.energy_j, outcome.energy_source = recorder.meter.joules(), recorder.meter.source
        outcome.dynamics = recorder.close(steps)
        _join_dynamics(folder)
    if sharded:
        outcome.model = dist.gathered(model, empty)
    return outcome


def _dynamics(folder: Path, rank: int) -> Path:
    return folder / (f"dynamics-{rank}.parquet" if rank else "dynamics.parquet")


def _join_dynamics(folder: Path) -> None:
    dist.barrier()
    files = [_dynamics(folder, r) for r in range(dist.world())]
    if dist.rank() == 0 and len(files) > 1:
        tables = [parquet.read_table(f) for f in files]
        others = [t.filter([k == "train" for k in t["kind"].to_pylist()]) for t in tables[1:]]  # evaluations are shared: once is enough
        whole = concat_tables([tables[0], *others])
        parquet.write_table(whole.sort_by("step"), files[0], compression="zstd")
        for f in files[1:]:
            f.unlink()


@torch.no_grad()
def require_apart(model: Any) -> None:
    """UserError unless the model keeps two texts of one row apart when it is given their position ids."""
    training, device = model.training, model.device
    model.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]], device=device) % model.config.get_text_config().vocab_size
    places = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    together = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 3:]
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    model.train(training)
    if not torch.allclose(together.float(), alone.float(), atol=1e-4 * float(alone.abs().max() + 1)):
        raise UserError(
            f"{type(model).__name__} mixes the texts of a packed row", "it makes no attention mask from position ids", "turn packing off"
        )


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
