"""transformers' Trainer with our loss normalisation, hooks for techniques, sharding, and states that are marked when whole.

Summed losses are divided by counts over the whole accumulation window and all processes, so 4 x 2 accumulation is 1 x 8
whatever the padding, and two processes are one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer as HFTrainer

from modelwright.core.data.rows import IGNORE
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.train import dist
from modelwright.core.train.objective import NextToken, Objective
from modelwright.core.train.precision import StochasticAdamW
from modelwright.core.train.recorder import Recorder
from modelwright.core.train.states import COMPLETE, KEPT, disk_sentence, latest_state, mark_complete, step_of
from modelwright.core.train.technique import LossTerm, Technique, plain_name

__all__ = ["COMPLETE", "Trainer", "forward", "latest_state", "step_of"]


class Trainer(HFTrainer):
    """transformers.Trainer with techniques, an objective, exact normalisation, a recorder, sharding, and marked states."""

    model: Any
    objective: Objective
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        techniques: list[Technique],
        recorder: Recorder | None,
        on_save: Callable[[], dict[str, Any]],
        objective: Objective | None = None,
        settings: Train | None = None,
        **kwargs: Any,
    ):
        if getattr(kwargs["model"], "is_distributed_loading_by_transformers", False):
            kwargs["model"]._is_distributed_loading_by_transformers = False  # it would refuse to save states; ours hold shards
        super().__init__(**kwargs)
        self.techniques, self.recorder, self.on_save = techniques, recorder, on_save
        self.objective = objective or NextToken(self.model)
        self.settings = settings or Train()
        self.terms = [LossTerm(), *(t for q in techniques for t in q.terms())]
        self.loss_is_scaled_for_ga = True
        self.lr_used, self.tokens = 0.0, 0
        self.norm: Tensor | None = None  # of the last gradient, before clipping
        self.seen: list[Tensor] = []  # each pass's share of the loss of a step
        self._counts: dict[str, Tensor] = {}
        # The Trainer's name for weights that are DTensors already: it neither wraps nor shards them again.
        self.sharded = self.is_distributed_loading_by_transformers = any(dist.offset(p) is not None for p in self.model.parameters())

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(plain_name(n), p) for n, p in self.model.named_parameters()]

    # ---- one optimizer step ----------------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, and the counts that its losses are divided by, over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        for b in batches:
            self.objective.prepare(b, self.state.global_step)
        if batches:
            local = [torch.stack([t.count(b).double() for b in batches]).sum() for t in self.terms]
            real = torch.stack([b["real"].sum() for b in batches]).sum()
            *counts, seen = dist.sum_over_ranks(*local, real)
            self._counts = {t.name: torch.where(c > 0, c, 1.0) for t, c in zip(self.terms, counts, strict=True)}
            self.tokens += int(seen)
        return batches, None

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of one forward pass: weighted sums over the counts of the whole step."""
        self.lr_used = self._get_learning_rate()
        for t in self.techniques:
            t.before_batch(inputs)
        lm, *others = self.terms
        outputs = self.objective.forward(model, inputs, lm.weights(inputs))
        if self.recorder:
            self._record(inputs, outputs.losses)
        total = outputs.total / self._counts[lm.name].to(outputs.total)
        self.seen.append(total.detach())
        for term in others:
            total = total + term.weight * term.sums(inputs, outputs).sum() / self._counts[term.name].to(total)
        total = total * dist.world()  # DDP and FSDP average gradients over processes; the count is already global
        return (total, outputs) if return_outputs else total

    def step_loss(self) -> float:
        """The loss of the step that just ended, over all processes."""
        total = torch.stack([s.double() for s in self.seen]).sum() if self.seen else torch.zeros((), dtype=torch.float64)
        self.seen = []
        return float(dist.sum_over_ranks(total)[0])

    def _record(self, inputs: dict[str, Tensor], losses: Tensor) -> None:
        learnt = inputs["labels"][:, 1:] != IGNORE
        examples, sums, counts = inputs["example_id"], losses.sum(1), learnt.sum(1)
        if "segments" in inputs:  # several examples in a row
            examples, of = inputs["segments"][:, 1:].unique(return_inverse=True)
            sums = losses.new_zeros(len(examples)).index_add_(0, of.flatten(), losses.flatten())
            counts = learnt.new_zeros(len(examples), dtype=torch.long).index_add_(0, of.flatten(), learnt.flatten().long())
        real = examples >= 0
        self.recorder.train(self.state.global_step + 1, self.lr_used, examples[real], sums[real], counts[real])  # type: ignore[union-attr]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for t in self.techniques:
            t.on_gradients(self._named())
        self.norm = super()._clip_grad_norm(model)
        return self.norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, or AdamW with stochastic rounding or bf16 moments; with the techniques' own groups."""
        k = self.settings
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        if k.weights == "stored" and (k.rounding == "stochastic" or k.states == "bf16"):
            params = [p for p in self.model.parameters() if p.requires_grad]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            kind = torch.bfloat16 if k.states == "bf16" else torch.float32
            self.optimizer = StochasticAdamW(params, k.lr, betas, self.args.adam_epsilon, k.weight_decay, self.args.seed, kind)
            self.optimizer.stochastic = k.rounding == "stochastic"
        else:
            super().create_optimizer(*args, **kwargs)
        self._own_groups()
        return self.optimizer

    def _own_groups(self) -> None:
        """Give each technique its parameter groups and the optimizer."""
        for t in self.techniques:
            for group in t.groups(self._named()):
                if group.get("maximize") and "maximize" not in self.optimizer.defaults:
                    raise UserError(
                        f"{t.name} does not go with this optimizer", "it has values that rise, and the optimizer only lowers", "use adamw"
                    )
                own = {id(p) for p in group["params"]}
                for g in self.optimizer.param_groups:
                    g["params"] = [p for p in g["params"] if id(p) not in own]
                self.optimizer.add_param_group(group)
            t.optimizer = self.optimizer

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    # ---- states ----------------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.recorder:
                self.recorder.flush(self.state.global_step)
            dist.barrier()
            if self.args.should_save:
                torch.save([t.state_dict() for t in self.techniques], folder / "techniques.pt")
                facts = self.on_save() | {"step": self.state.global_step, "processes": dist.world()}
                mark_complete(folder, facts, max(KEPT, self.settings.keep))
        except (OSError, RuntimeError) as error:
            if said := disk_sentence(error, folder):
                raise said from None
            raise
        dist.barrier()

    # Weights are kept under the names they have in memory: those that save_pretrained writes are others for some models (experts), and
    # what is not found under them would stay as it was. A sharded state is one file a process: the local pieces.
    def _held(self) -> dict[str, Tensor]:
        """What training changes: weights that learn, and buffers that are saved with a model."""
        stored = self.model.state_dict().keys()
        learning = {n: p.detach() for n, p in self._named() if p.requires_grad}
        return learning | {n: b for n, b in self.model.named_buffers() if n in stored}

    def _file(self, folder: str | None, what: str) -> Path:
        return Path(str(folder)) / f"{what}-{dist.rank() if self.sharded else 0}.pt"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a state."""
        file = self._file(output_dir, "weights")
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.sharded or self.args.should_save:
            torch.save({n: dist.local(t) for n, t in self._held().items()}, file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved, held = torch.load(self._file(resume_from_checkpoint, "weights"), weights_only=True, map_location="cpu"), self._held()
        if saved.keys() != held.keys():
            raise RuntimeError(f"{resume_from_checkpoint} holds other weights: {sorted(saved.keys() ^ held.keys())[:3]}")
        with torch.no_grad():
            for n, t in held.items():
                dist.local(t).copy_(saved[n])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        moments = {
            n: {k: dist.local(v) if isinstance(v, Tensor) else v for k, v in self.optimizer.state[p].items()}
            for n, p in self._named()
            if p in self.optimizer.state
        }
        return torch.save({"moments": moments, "scheduler": self.lr_scheduler.state_dict()}, self._file(output_dir, "optimizer"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or not checkpoint:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(self._file(checkpoint, "optimizer"), weights_only=True)
        for n, p in self._named():
            for k, v in state["moments"].get(n, {}).items():
                self.optimizer.state[p][k] = dist.like(p, v) if isinstance(v, Tensor) and v.dim() else v
        self.lr_scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr  # the schedule sets it at its next step only
        return None


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model's own outputs, logits included, on a batch as `collate` makes it."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    return model(**inputs, use_cache=False)
