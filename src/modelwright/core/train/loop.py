"""The only training loop: any techniques under any objective, one process or many, resumed bit for bit.

One optimizer step, with the places where techniques act:

    for batch in window:                     # accumulation; Trainer.get_batch_samples counts the targets of all processes first
        technique.before_batch(batch)
        loss = objective.forward(model, batch) / count  +  sum of the techniques' loss terms / their counts
        loss.backward()
    technique.on_gradients(parameters)       # edit gradients
    clip; optimizer.step()
    technique.after_step(parameters)         # edit weights
    first step with a learning rate: technique.liveness(what moved)

Before all of it: attach (new modules), select (what may move), prepare (rows). DDP is the Trainer's own. FSDP2 is applied
here: the Trainer's path to it falls back to DDP without a word where there is no GPU.
"""

import math
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

from modelwright.core.data.rows import PaddedDataset, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist, precision
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.objective import Objective, objective_class
from modelwright.core.train.recorder import Recorder
from modelwright.core.train.requirements import require_apart, require_positions
from modelwright.core.train.sight import Sight
from modelwright.core.train.states import all_states, damaged_states, facts_of, latest_state, remove_unfinished, step_of
from modelwright.core.train.technique import Technique, changed_units, checksums, combine, environment
from modelwright.core.train.trainer import Trainer

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
    log: list[dict[str, Any]] = field(default_factory=list)  # step, loss, lr, grad_norm, tokens_per_second
    notes: list[str] = field(default_factory=list)  # what a person should know

    def at(self, name: str, last: bool = True) -> dict[str, Any]:
        """The first or last evaluation of one held-out text."""
        return [e for e in self.evals if e["name"] == name][-1 if last else 0]


def steps_for(rows: TokenRows, train: Train) -> int:
    """Optimizer steps for a token budget or a number of passes."""
    per_epoch = math.ceil(math.ceil(len(rows) / (train.batch * dist.world())) / train.accumulate)
    if not train.tokens:
        return max(1, math.ceil(train.epochs * per_epoch - 1e-9))
    passes, rest = divmod(train.tokens, rows.tokens)
    return max(1, passes * per_epoch + math.ceil(rest * len(rows) / rows.tokens / (train.batch * train.accumulate * dist.world())))


# ---- the run -----------------------------------------------------------------------------------------------------------
def fit(
    model: Any,
    rows: TokenRows,
    train: Train,
    *,
    techniques: list[Technique],
    evals: dict[str, TokenRows],
    folder: Path,
    seed: int,
    tick: Callable[[int, int], None] = lambda step, of: None,
    say: Callable[[dict[str, Any]], None] = lambda numbers: None,
    objective: Objective | None = None,
) -> Outcome:
    """Train `model` on `rows`; resumes by itself from the newest whole state in `folder`, bit-equal to an unbroken run.

    `tick(step, of)` is called after each step, `say(numbers)` now and then with loss, rate, gradient norm and speed. Raises UserError for
    a model without a head to train, a loss that diverges, weights that cannot move. `outcome.model` is the trained model with its adapters.
    """
    techniques = techniques or [Technique()]
    objective = objective or objective_of(techniques, model, None, train, seed)
    require_positions(model, rows, 2 if objective.kind == "masked" else 0)
    torch.manual_seed(seed)
    model, rows, blocks = _prepared(model, rows, train, techniques, seed)
    objective.whole_logits = objective.whole_logits or any(t.whole_logits for t in techniques)
    if rows.packed:
        require_apart(model)
    model, empty = _sharded(model, blocks, train)
    steps, state, saved = steps_for(rows, train), *_found_state(folder)
    for t in techniques:
        t.steps = steps
    recorder = Recorder(_dynamics(folder, dist.rank()), step_of(state) if state else 0) if train.record else None
    outcome = Outcome(steps, 0, model=model, notes=[f"{name} was damaged and is not used" for name in damaged_states(folder)])
    dist.barrier()
    if dist.rank() == 0:
        remove_unfinished(folder)
    if state:
        outcome.evals, outcome.liveness = saved["evals"], saved["liveness"]
        for t, s in zip(techniques, torch.load(state / "techniques.pt", weights_only=True), strict=True):
            t.load_state_dict(s)
    loop = _Loop(techniques, evals, train, tick, outcome, recorder, objective)
    trainer = Trainer(
        model=model,
        args=_arguments(folder, train, steps, seed),
        train_dataset=PaddedDataset(rows, train.batch * train.accumulate * dist.world()),
        data_collator=objective.collate,
        techniques=techniques,
        recorder=recorder,
        objective=objective,
        settings=train,
        on_save=lambda: {"evals": outcome.evals, "liveness": outcome.liveness, "tokens": trainer.tokens},
        callbacks=[loop],
    )
    trainer.tokens = saved["tokens"] if state else 0
    loop.trainer, loop.sight = trainer, Sight(trainer, folder, steps, say)
    loop.sight.resume(step_of(state) if state else 0)
    for c in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in ("PrinterCallback", "ProgressCallback")]:
        trainer.remove_callback(c)
    objective.install(trainer.model)
    try:
        _train(trainer, loop, state, steps)
    finally:
        objective.remove()
    return _finished(outcome, trainer, loop, recorder, techniques, empty, folder)


def objective_of(techniques: list[Technique], model: Any, tokenizer: Any, train: Train, seed: int) -> Objective:
    """A technique's own objective, or what the model's class learns from."""
    for t in techniques:
        if (own := t.objective(model, tokenizer, train, seed)) is not None:
            return own
    return objective_class(model)(model, tokenizer, seed, train.mask_share)


def _prepared(model: Any, rows: TokenRows, train: Train, techniques: list[Technique], seed: int) -> tuple[Any, TokenRows, list[Any]]:
    """The techniques put on model and rows, and weights held in the type they train in. Also gives the model's blocks."""
    combine(techniques, environment(model, train))
    if train.attention:
        try:
            model.set_attn_implementation(train.attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"attention={train.attention} does not work here", str(error).splitlines()[0], "leave it empty") from None
    anatomy = Anatomy(model)
    blocks = [b.module for b in anatomy.blocks]
    for t in techniques:
        model = t.attach(model, anatomy)
    for t in techniques:
        t.select(model, anatomy, seed)
        rows = t.prepare(rows)
    combine(techniques, environment(model, train))  # what edits gradients is known only now
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{' and '.join(t.name for t in techniques)} leave nothing to train", "every weight is frozen", "loosen one")
    precision.hold(model, train)
    return model, rows, blocks


def _sharded(model: Any, blocks: list[Any], train: Train) -> tuple[Any, Any]:
    """The model cut over the processes where that is asked for, and an empty copy that the whole can be gathered in."""
    if dist.world() == 1 or train.strategy == "ddp" or any(dist.offset(p) is not None for p in model.parameters()):
        return model, None
    if train.strategy == "ep":
        raise UserError("the experts cannot be spread here", "a method changes the model after it is loaded", "use train.strategy: fsdp2")
    model.to(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    empty = dist.emptied(model)
    dist.shard(model, blocks, train.strategy, train.replicas)
    return model, empty


def _found_state(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    state = latest_state(folder)
    saved = (facts_of(state) if state else None) or {}
    if state and saved["processes"] != dist.world():
        before = saved["processes"]
        raise UserError(f"the run in {folder} was begun with {before} processes", f"now there are {dist.world()}", f"use {before}")
    return state, saved


def _arguments(folder: Path, train: Train, steps: int, seed: int) -> TrainingArguments:
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
        optim=precision.optimizer_name(train.optimizer),
        max_grad_norm=train.clip or math.inf,  # without a limit transformers would skip the hook that edits gradients
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=train.save_every,
        report_to=train.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not cuda,
        bf16=precision.autocasts() and train.weights == "fp32",
        dataloader_pin_memory=cuda,
        ddp_backend="gloo" if dist.world() > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
    )
    setattr(args, _RECOMPUTE, train.gradient_checkpointing)
    return args


def _train(trainer: Trainer, loop: "_Loop", state: Path | None, steps: int) -> None:
    if state and step_of(state) >= steps:  # trained to the end, then stopped before the result was published
        trainer._load_from_checkpoint(str(state))
        return
    cache = getattr(trainer.model.config, "use_cache", None)
    try:
        with _graceful(loop):
            trainer.train(resume_from_checkpoint=str(state) if state else None)
    finally:
        if cache is not None:  # the Trainer switches it off in the config that is saved
            trainer.model.config.use_cache = cache
    if loop.interrupted and trainer.state.global_step < steps:
        raise KeyboardInterrupt


def _finished(
    outcome: Outcome, trainer: Trainer, loop: "_Loop", recorder: Recorder | None, techniques: list[Technique], empty: Any, folder: Path
) -> Outcome:
    outcome.tokens, outcome.log = trainer.tokens, loop.sight.lines
    if not outcome.liveness:
        raise UserError(
            "nothing was trained",
            f"the learning rate was never above zero in {outcome.steps} steps",
            "raise train.lr, lower train.warmup or train longer",
        )
    outcome.facts = {t.name: f for t in techniques if (f := t.facts())}
    if recorder:
        outcome.energy_j, outcome.energy_source = recorder.meter.joules(), recorder.meter.source
        if recorder.lost:
            outcome.notes.append(f"{recorder.lost} parts of the recorded dynamics were damaged and are missing")
        outcome.dynamics = recorder.close(outcome.steps)
        _join_dynamics(folder)
    if empty is not None:
        outcome.model = dist.gathered(outcome.model, empty)
    return outcome


class _Loop(TrainerCallback):
    """Progress, evaluation, liveness, divergence, and a graceful Ctrl-C."""

    trainer: Trainer
    sight: Sight

    def __init__(
        self,
        techniques: list[Technique],
        evals: dict[str, TokenRows],
        train: Train,
        tick: Callable[[int, int], None],
        outcome: Outcome,
        recorder: Recorder | None,
        objective: Objective,
    ):
        self.techniques, self.evals, self.train, self.tick, self.outcome = techniques, evals, train, tick, outcome
        self.recorder, self.objective = recorder, objective
        self.every = train.eval_every or max(1, outcome.steps // 10)
        self.interrupted = False
        self._before: dict[str, Tensor] = {}
        self._rounding: precision.Rounding | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.evaluate(0)
        if not self.outcome.liveness:
            self._before = checksums(self.trainer.model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._before and self.trainer.lr_used > 0:
            self._rounding = precision.Rounding(self.trainer.model)
            self._rounding.gradients(self.trainer.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._rounding is not None:
            self._check_rounding(self._rounding)
        for t in self.techniques:
            t.after_step(self.trainer._named())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._before and self.trainer.lr_used > 0:  # the first step of a warm-up has learning rate 0
            self._check_liveness()
        if problem := self.sight.step(state.global_step):
            self._stop(problem)
        self.tick(state.global_step, state.max_steps)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)
        if dist.any_of(self.interrupted):
            self.interrupted = True
            control.should_save = control.should_training_stop = True

    def _check_rounding(self, rounding: precision.Rounding) -> None:
        self._rounding, stuck = None, rounding.stuck(self.trainer.model)
        if stuck is None:
            return
        said = f"{stuck:.0%} of the trained weights had a gradient and did not move: their type rounds the step away"
        if stuck > 0.5 and self.train.rounding != "stochastic":
            raise UserError(
                said, f"train.weights is stored and train.lr is {self.train.lr}", "use train.weights: fp32 or rounding: stochastic"
            )
        self.outcome.notes.append(said)

    def _check_liveness(self) -> None:
        moved = changed_units(self.trainer.model, self._before)
        try:
            self.outcome.liveness = [t.liveness(moved) for t in self.techniques]
        except RuntimeError as error:
            raise UserError(str(error), f"train.lr is {self.train.lr}", "raise train.lr, or check what the method may move") from error
        self._before = {}

    def evaluate(self, step: int) -> None:
        """Every held-out text; UserError where a loss is not finite."""
        for name, held_out in self.evals.items():
            result = evaluate_rows(self.trainer.model, held_out, self.train.batch, self.objective)
            if not math.isfinite(result["loss"]):
                self._stop(f"the loss of {name} is not finite at step {step}")
            self.outcome.evals.append({"step": step, "name": name, **result})
            if self.recorder:
                self.recorder.eval(step, name, result["loss"], int(result["tokens"]))

    def _stop(self, problem: str) -> None:
        kept = [s.name for s in all_states(Path(str(self.trainer.args.output_dir)))]
        what = f"the states {' and '.join(kept)} are kept" if kept else "no state was saved yet"
        raise UserError(problem, f"{what}; train.lr is {self.train.lr}", "lower train.lr, or set train.divergence: 0 to go on all the same")


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
