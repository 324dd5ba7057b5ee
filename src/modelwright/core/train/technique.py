"""The contract of a training method, and how several are put together.

A Technique has six optional parts: a data policy, an objective, an attachment, a selector, loss terms, an update rule. It says what it
works with; `combine` refuses a pair that does not go together with a sentence. A loss term returns a sum and a count,
never a mean: sums are divided by the count over the whole accumulation window and all processes.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist

Named = Iterable[tuple[str, nn.Parameter]]
_WRAPPERS = re.compile(r"(^|\.)(module|base_model\.model|_orig_mod|_checkpoint_wrapped_module)(?=\.)")
_WHY = {
    "zero0": "DeepSpeed runs the optimizer inside the backward pass, before a gradient can be edited",
    "zero1": "DeepSpeed runs the optimizer inside the backward pass, before a gradient can be edited",
    "zero2": "DeepSpeed takes the gradients away as they are made and runs the optimizer inside the backward pass",
    "zero3": "DeepSpeed cuts parameters and gradients into flat pieces without names or shapes",
    "4bit": "quantised weights cannot be trained, only adapters beside them",
    "lora": "adapters freeze every base weight already",
    "ddp": "it has no rule for several processes",
    "fsdp2": "it has no rule for sharded weights",
    "ep": "it has no rule for experts that lie on other processes",
    "gradient_checkpointing": "activations are computed twice",
    "fused": "it needs an optimizer that steps one tensor at a time",
}
_ONE = {  # parts that only one method of a step may have
    "load": "each trains a model of its own kind",
    "rows": "each makes the rows its own way",
    "objective": "each has a loss of its own",
}
_HOW = {
    "zero": "use torchrun with train.strategy ddp or fsdp2",
    "4bit": "load the model unquantised, or tune adapters",
    "lora": "leave one of the two out",
    "gradient_checkpointing": "set train.gradient_checkpointing to false",
}


def plain_name(name: str) -> str:
    """A parameter's name as in the plain model, without what wrappers (DDP, PEFT, compile) add."""
    name = _WRAPPERS.sub("", name).removeprefix(".")
    return name if ".lora_" in name else name.replace(".base_layer.", ".")


class LossTerm:
    """Next-token cross-entropy, and the shape of every other term: `count` from the batch alone, `sums` per example."""

    name, weight = "lm", 1.0

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        """Weight of each predicted token, (B, T-1)."""
        learnt = batch["labels"][:, 1:] != IGNORE
        return learnt * batch["weights"][:, 1:] if "weights" in batch else learnt

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """What the sum is divided by, over window and processes: here the summed weights of the learnt tokens."""
        return self.weights(batch).sum()

    def losses(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """Cross-entropy of each predicted token, unweighted, 0 where nothing is learnt; (B, T-1)."""
        if getattr(outputs, "losses", None) is not None:
            return outputs.losses
        labels = batch["labels"][:, 1:]
        flat = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return flat.view_as(labels)

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        """Summed loss of each row, (B,)."""
        return (self.losses(batch, outputs) * self.weights(batch)).sum(1)


class Technique:
    """A training-time method. Override what it changes; everything else stays plain training."""

    name = "full"
    supports = frozenset({"ddp", "fsdp2", "ep", "zero0", "zero1", "zero2", "zero3", "fused", "gradient_checkpointing", "lora"})
    adapters = False  # attaches low-rank adapters and freezes the base
    tokenizer: Any = None  # set by `rows` where the method changes it; saved with the result
    round = 0  # tuning steps that the model has been through before this one
    first_task = False  # the first of a sequence of tasks
    stops: tuple[int, ...] = ()  # ids that end what the assistant says, where the method's own rows teach them
    whole_logits = False  # reads the logits of all tokens, which are not computed otherwise
    same_kind = True  # the result is of the source's class, so that the certificate compares what the two give
    source: Any = None  # the checkpoint that is tuned: a frozen reference can be loaded from it
    steps = 0  # optimizer steps of the run
    optimizer: Any = None  # set once it is made
    loads = True  # whether its `load`, where it has one, is used with these settings

    def load(self, source: Any, dtype: Any) -> Any:
        """The model to train, where it is not `source.model(dtype)`: another class, another head. None leaves it to that."""
        return None

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Any:
        """The objective (core/train/objective.py) that the method trains under; None leaves it to what the model's class learns from."""
        return None

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows | None:
        """Data policy: the rows of a source; None leaves it to plain texts and chats."""
        return None

    def settings(self, rows: TokenRows, train: Train) -> Train:
        """Data policy: training settings that follow from the rows."""
        return train

    def prepare(self, rows: TokenRows) -> TokenRows:
        """Data policy: change or reorder rows that are made already."""
        return rows

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        """Attachment: add modules, before anything is wrapped. Returns the model to train."""
        return model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        """Selector: take requires_grad away, before the optimizer exists."""

    def groups(self, named: Named) -> list[dict[str, Any]]:
        """Parameter groups with optimizer settings of their own: {"params": [...], "lr": 1.0, "maximize": True, "weight_decay": 0.0}.

        The parameters that they name leave the usual groups; the schedule scales their rate as it does the others'.
        """
        return []

    def terms(self) -> list[LossTerm]:
        """Loss terms added to the sum."""
        return []

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        """Called before each forward pass of training."""

    def on_gradients(self, named: Named) -> None:
        """Update rule: edit gradients, once per optimizer step, before clipping. Sharded ones are DTensors."""

    def after_step(self, named: Named) -> None:
        """Update rule: act on the weights after the optimizer's step."""

    def liveness(self, moved: dict[str, Tensor]) -> str:
        """A sentence that proves the method did something in the first step; raises RuntimeError when it did not.

        `moved` tells for each parameter, by its plain name, which output units changed: (units,) bool.
        """
        n = sum(bool(m.any()) for m in moved.values())
        if not n:
            raise RuntimeError(f"{self.name}: no weight moved in the first step")
        return f"{self.name}: {n} of {len(moved)} tensors moved"

    @property
    def adds_weights(self) -> bool:
        """Whether the trained model has other weights than the one that is loaded; a model that only the processes together hold cannot."""
        return overrides(self, "attach") or overrides(self, "export")

    @property
    def edits(self) -> bool:
        """Whether gradients or stepped weights are edited."""
        return overrides(self, "on_gradients") or overrides(self, "after_step")

    def facts(self) -> dict[str, Any]:
        """What to report at the end."""
        return {}

    def exported(self) -> dict[str, Any]:
        """What `export` found out, beside the facts of the training."""
        return {}

    def plots(self) -> list[dict[str, Any]]:
        """What to draw at the end (core/report/plots.py)."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors needed to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of state_dict."""

    def export(self, model: Any, folder: Path) -> Any:
        """The plain model to save; may write extra files into `folder`."""
        return model


def overrides(technique: Technique, part: str) -> bool:
    """Whether a technique has a part of its own."""
    return getattr(type(technique), part) is not getattr(Technique, part)


def environment(model: Any, train: Train) -> set[str]:
    """What the techniques must cope with: processes, sharding, DeepSpeed, recomputation, quantised weights."""
    found = {"fused"} | ({"gradient_checkpointing"} if train.gradient_checkpointing else set())
    if dist.world() > 1:
        found |= {"ddp": {"ddp"}, "ep": {"fsdp2", "ep"}}.get(train.strategy, {"fsdp2"})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        found = found - {"ddp", "fsdp2"} | {f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"}
    if getattr(model, "is_quantized", False):
        found.add("4bit")
    return found


def combine(techniques: list[Technique], environment: set[str]) -> None:
    """Raise UserError for techniques that do not work together or in this environment; called again after selection."""
    for part, why in _ONE.items():
        makers = [t.name for t in techniques if overrides(t, part) and (part != "load" or t.loads)]
        if len(makers) > 1:
            raise UserError(f"{' and '.join(makers)} do not combine", why, "choose one of them")
    for t in techniques:
        needs = set(environment)
        if any(other.adapters for other in techniques if other is not t):
            needs.add("lora")
        missing = _unsupported(t, needs)
        if missing is not None:
            named = {"lora": "adapters", "4bit": "4-bit weights"}
            words = named.get(missing, missing.replace("zero", "DeepSpeed ZeRO stage ").replace("_", " "))
            how = _HOW["zero"] if missing.startswith("zero") else _HOW.get(missing, "")
            raise UserError(f"{t.name} does not work with {words}", _WHY.get(missing, ""), how)


def _unsupported(technique: Technique, needs: set[str]) -> str | None:
    """The first need, by name, that a technique does not work with."""
    if technique.edits:  # whatever it says it supports: DeepSpeed steps before a gradient can be edited
        for need in sorted(needs):
            if need.startswith("zero"):
                return need
    missing = sorted(needs - technique.supports)
    return missing[0] if missing else None


def checksums(model: nn.Module) -> dict[str, Tensor]:
    """A checksum of every output unit of every parameter on this process, by plain name; int64, 8 bytes per unit.

    Two checksums differ where a bit of the unit's weights differs (but for one chance in 2^64).
    """
    found = {}
    for name, p in model.named_parameters():
        t = dist.local(p.detach())
        rows = t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(-1, 1)
        if in_out(model, name):
            rows = rows.T
        bits = rows.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
        odd = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C1 * 2 + 1
        found[plain_name(name)] = (bits.long() * odd).sum(1)
    return found


def in_out(model: nn.Module, name: str) -> bool:
    """Whether a weight is stored (in, out), as GPT-2's Conv1D does."""
    owner, _, last = name.rpartition(".")
    return last == "weight" and type(model.get_submodule(owner)).__name__ == "Conv1D"


def changed_units(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which output units changed since `before = checksums(model)`, seen over all processes: plain name -> (units,) bool."""
    after = checksums(model)
    pieces: list[Tensor] = []
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        key = plain_name(name)
        changed = (before[key] != after[key]).int()
        whole = changed if in_out(model, name) else _in_whole(p, changed)
        pieces.append(whole)
        sizes[key] = whole.numel()
    flat = torch.cat(pieces)
    if dist.world() > 1:
        flat = dist.all_sum(flat)
    return {key: part > 0 for key, part in zip(sizes, flat.split(list(sizes.values())), strict=True)}


def _in_whole(p: nn.Parameter, changed: Tensor) -> Tensor:
    """Units of this process's shard at their places among the units of the whole parameter."""
    start = dist.offset(p)
    if start is None:
        return changed
    units_per_row = 1
    if p.dim() > 2:  # stacked experts: one row of dimension 0 is an expert with many output units
        rows_here = max(dist.local(p).shape[0], 1)
        units_per_row = max(1, changed.numel() // rows_here)
    total = p.shape[0] * (p.shape[1] if p.dim() > 2 else 1)
    whole = changed.new_zeros(total)
    first = start * units_per_row
    whole[first : first + changed.numel()] = changed
    return whole
