"""LoRAMoE (2312.09979): LoRA experts with a soft router in the feed-forward matrices of a frozen dense model.

What for: large-scale fine-tuning that must not cost world knowledge. Experts form two groups; the localized balancing
constraint ties one group to the samples of type 1 (knowledge, such as closed-book questions) and the other to the rest.
Every linear layer has its own router and experts; step 0 is the base model bit for bit.

The paper's: 6 experts, delta = 0.1, beta = 0.1; r = 4, alpha = 32 and dropout 0.05 are the official script's. That script
ships with the constraint off, so `beta` must be given thought: it does not carry over between `form` paper and official.
The equations, the sign of the constraint (why prefer_match is the default) and the fused form: modelwright.moe.lora.
The official code counts padding, draws a dropout mask per expert, and breaks on an odd number of experts.

The type of a sample is a column of the data (`types`, 0 or 1); a row with `instruction` and `output` learns the output
only. Where the two are longer than the context the instruction loses its beginning, then the output its end; both are
counted. The result is one of our classes, or with merge "uniform" a plain model whose gate was dropped.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.data.packing import Texts, padded
from modelwright.core.data.read import is_text, read_table
from modelwright.core.data.rows import Rows
from modelwright.core.data.tables import column
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.moe.lora import localized, mass, wrap


@dataclass(frozen=True)
class Knobs(Tune):
    experts: int = knob(6, "N: adapters per layer; the first half is for samples of type 1", low=1)
    r: int = knob(4, "rank of each", low=1)
    alpha: float = knob(32.0, "scale: alpha / r times the sum")
    dropout: float = knob(0.05, "dropout on the adapters' input", low=0, high=1)
    roles: list[str] = knob(["ffn.gate", "ffn.up", "ffn.down"], "roles of the matrices that get experts")
    beta: float = knob(0.1, "coefficient of the constraint, summed over all layers; 0: off", low=0)
    delta: float = knob(0.1, "how far the groups part", low=0, high=0.99)
    convention: Literal["prefer_match", "paper"] = knob("prefer_match", "which group a type gets: as the paper says, or as it prints")
    form: Literal["paper", "official"] = knob("paper", "variance / mean, or / mean^2")
    mass: Literal["mean", "sum"] = knob("mean", "a sample's mass per token, or in all")
    types: str | None = knob(None, "column that holds each sample's type, 0 or 1; empty: plain balancing")
    merge: Literal["no", "uniform"] = knob("no", "uniform: drop the gates at the end and save a plain model")


class Constraint(LossTerm):
    """The sum over layers of the localized balancing constraint; a mean over micro-batches."""

    name = "localized balancing"

    def __init__(self, owner: "LoraMoe"):
        self.owner, self.weight = owner, owner.knobs.beta

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=batch["real"].device)

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        o, k = self.owner, self.owner.knobs
        rows = batch["real"].any(1)
        types = None if o.types is None else o.types[batch["example_id"].cpu().clamp(min=0)].to(rows.device)[rows]
        o.seen += len(o.sink)
        total = [
            localized(mass(w, batch["real"], k.mass)[rows], types, delta=k.delta, convention=k.convention, form=k.form) for w in o.sink
        ]
        o.sink.clear()
        return torch.stack(total).sum()[None] if int(rows.sum()) * k.experts > 1 else torch.zeros(1, device=batch["real"].device)


class LoraMoe(Technique):
    """Attaches the layers, freezes the rest, adds the constraint."""

    name = "lora_moe"
    adapters = True
    supports = Technique.supports - {"lora", "fsdp2"}

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.types: Tensor | None = None  # of each sample
        self.sink: list[Tensor] = []
        self.seen = 0

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> Rows | None:
        if is_text(data):
            if self.knobs.types is not None:
                raise UserError(f"{data.path} is plain text", f"its samples have no column '{self.knobs.types}'", "give a table")
            return None
        table = read_table(data)
        pairs = {"instruction", "output"} <= set(table[0])
        if self.knobs.types is None and (not pairs or data.column):
            return None
        if self.knobs.types is not None and self.knobs.types not in table[0]:
            raise UserError(
                f"{data.path} has no column '{self.knobs.types}'",
                "it must hold each sample's type",
                did_you_mean(self.knobs.types, table[0]),
            )
        get = lambda name: column(data.path, table, name)[: data.limit]  # noqa: E731
        if pairs and not data.column:
            instructions, outputs = get("instruction"), get("output")
        else:
            outputs = get(data.column or "text")
            instructions = [""] * len(outputs)
        texts, facts = _texts(instructions, outputs, tokenizer, train.context)
        if self.knobs.types is not None and self.types is None:  # the first source is the one to learn from
            found = get(self.knobs.types)
            if bad := [i for i, t in enumerate(found) if t not in (0, 1, "0", "1")]:
                raise UserError(f"row {bad[0] + 1} of '{self.knobs.types}' is {found[bad[0]]!r}", "a type is 0 or 1")
            self.types = torch.tensor([int(t) for t in found])
        made = padded(texts, train.context)
        return replace(made, facts=made.facts | facts)

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        from modelwright.models.lora_moe import unlike

        if (why := unlike(model)) and self.knobs.merge == "no":
            raise UserError(
                f"lora_moe cannot keep its experts in a {type(model).__name__}", why, "set merge: uniform, or give such a model"
            )
        k = self.knobs
        names = [p.name.removesuffix(".weight") for p in anatomy if p.role in k.roles and p.kind == "weight"]
        linear = [n for n in names if type(model.get_submodule(n)) is torch.nn.Linear]
        if not linear or len(linear) < len(names):
            raise UserError(
                f"roles has {', '.join(k.roles)}",
                f"{type(model).__name__} has no plain linear layers of them",
                "choose others, or another model",
            )
        self.names = linear
        self.layers = wrap(model, linear, experts=k.experts, r=k.r, alpha=k.alpha, dropout=k.dropout)
        for n, p in model.named_parameters():
            p.requires_grad_(".lora_" in n)
        for layer in self.layers:
            layer.sink = self.sink if k.beta else None
        return model

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        self.sink.clear()

    def terms(self) -> list[LossTerm]:
        return [Constraint(self)] if self.knobs.beta else []

    def liveness(self, moved: dict[str, Tensor]) -> str:
        held = [n for n, m in moved.items() if ".lora_" not in n and bool(m.any())]
        free = [n for n, m in moved.items() if ".lora_" in n and bool(m.any())]
        if held or not free or self.knobs.beta and not self.seen:
            raise RuntimeError(f"lora_moe: {len(held)} frozen and {len(free)} new tensors moved, {self.seen} gates were seen")
        return f"lora_moe: {len(free)} tensors of {len(self.layers)} layers moved, 0 of {len(moved) - 3 * len(self.layers)} others"

    def facts(self) -> dict[str, Any]:
        samples: dict[str, int] = {} if self.types is None else {"samples of type 1": int(self.types.sum()), "samples": len(self.types)}
        return {"trainable": sum(p.numel() for q in self.layers for p in (q.lora_A, q.lora_B, q.lora_route)), **samples}

    def export(self, model: Any, folder: Path) -> Any:
        from modelwright.models.lora_moe import packed, unwrapped

        for layer in self.layers:
            layer.sink = None
        return unwrapped(model, self.names) if self.knobs.merge == "uniform" else packed(model, self.names, self.layers[0])


def _texts(instructions: list[Any], outputs: list[Any], tokenizer: Any, context: int) -> tuple[Texts, dict[str, int]]:
    """Each instruction, an end token, the output, an end token; only the output and its end are learnt."""
    if tokenizer is None and not all(isinstance(t, list) for t in outputs):
        raise UserError("the checkpoint has no tokenizer", "the data is text", "add tokenizer files, or give a column of token ids")
    end = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ids(value: Any, row: int) -> list[int]:
        if isinstance(value, list) and all(type(t) is int for t in value):
            return list(value)
        if value is None or isinstance(value, (list, dict)):
            raise UserError(f"row {row + 1} holds {value!r}", "text or a list of token ids is needed", "fix or drop the row")
        return tokenizer(str(value), add_special_tokens=False)["input_ids"]

    texts, facts = Texts(), {"instructions cut at the context": 0, "outputs cut at the context": 0}
    for i, (a, b) in enumerate(zip(instructions, outputs, strict=True)):
        first, last = (ids(a, i) + end) if a else [], ids(b, i) + end
        over = len(first) + len(last) - context
        facts["instructions cut at the context"] += over > 0 and bool(first)
        facts["outputs cut at the context"] += len(last) > context
        first, last = first[max(over, 0) :], last[:context]  # what is asked stands at the end of an instruction
        texts.ids.append(first + last)
        texts.weights.append([0.0] * len(first) + [1.0] * len(last))
    return texts, facts


METHOD = LoraMoe
