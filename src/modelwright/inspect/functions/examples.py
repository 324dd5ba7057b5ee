"""Labelled examples of sub-functions, and what every neuron does on them.

One row per example: `text`, `label` (0 or 1), and where there are several, `function` (the sub-function: one word sense
pair, one relation, one task) and `level` (semantic, knowledge, task). Token ids may stand in place of text, as `input_ids`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.core.data.tables import table
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Block
from modelwright.inspect.functions.precision import predictivity
from modelwright.moe.watch import routers

_VALUES = 1 << 28  # activations held at a time


@dataclass
class SubFunction:
    """One binary question: token ids by example, labels (n,) bool."""

    name: str
    level: str
    ids: list[list[int]]
    labels: np.ndarray
    cut: int = 0  # examples longer than the context
    left: int = 0  # examples beyond the limit

    @property
    def chance(self) -> float:
        """The average precision of a neuron that knows nothing, for the better of the two labels."""
        p = float(self.labels.mean())
        return max(p, 1 - p)


def read_examples(path: Path, tokenizer: Any, vocab: int, context: int, limit: int) -> list[SubFunction]:
    """The sub-functions in a file, with at most `limit` examples per label; UserError where one has a single label."""
    if not path.is_file():
        raise UserError(f"no examples at {path}", how="give a jsonl, json, csv or parquet file")
    names, values_of = table(path)
    words = next((n for n in ("input_ids", "text") if n in names), None)
    if words is None or "label" not in names:
        raise UserError(
            f"{path} has no column '{'label' if words else 'text'}'", "it needs text and label", "see modelwright show inspect.modularity"
        )
    if words == "text" and tokenizer is None:
        raise UserError("the checkpoint has no tokenizer", "the examples are text", "add tokenizer files, or give a column input_ids")
    count = len(texts := values_of(words))
    functions = values_of("function") if "function" in names else ["all"] * count
    levels = values_of("level") if "level" in names else ["task"] * count
    rows: dict[tuple[str, str], list[tuple[Any, bool]]] = {}
    for line, (text, label, function, level) in enumerate(zip(texts, values_of("label"), functions, levels, strict=True), 1):
        if str(label) not in ("0", "1", "True", "False") or not text:
            raise UserError(
                f"row {line} of {path} does not fit", f"its label is {label!r}" if text else "its text is empty", "labels are 0 and 1"
            )
        rows.setdefault((str(level or "task"), str(function or "all")), []).append((text, str(label) in ("1", "True")))
    return [_function(name, level, own, words, tokenizer, vocab, context, limit, path) for (level, name), own in rows.items()]


def _function(
    name: str, level: str, rows: list[tuple[Any, bool]], words: str, tokenizer: Any, vocab: int, context: int, limit: int, path: Path
) -> SubFunction:
    kept: list[tuple[Any, bool]] = []
    seen = {True: 0, False: 0}
    for row in rows:
        seen[row[1]] += 1
        if seen[row[1]] <= limit:
            kept.append(row)
    if not all(seen.values()):
        raise UserError(
            f"function '{name}' in {path} has one label only", "a neuron is judged by how well it tells 0 from 1", "give examples of both"
        )
    ids = [list(t) for t, _ in kept] if words == "input_ids" else tokenizer([t for t, _ in kept], add_special_tokens=False)["input_ids"]
    if any(not one for one in ids):
        raise UserError(f"function '{name}' in {path} has an example without tokens", how="remove it")
    if (top := max(map(max, ids))) >= vocab:
        raise UserError(f"token id {top} is out of range", f"the model has {vocab} embeddings", "use the tokenizer of the model")
    cut = sum(len(one) > context for one in ids)
    return SubFunction(name, level, [one[:context] for one in ids], np.array([y for _, y in kept]), cut, len(rows) - len(kept))


# ---- activations -----------------------------------------------------------------------------------------------------
@dataclass
class Site:
    """Where a layer's neurons are seen."""

    layer: int
    neurons: int
    module: nn.Module
    read: Callable[[tuple, Any], Tensor]  # from a hook's inputs and output: activations (tokens, F), not negative
    labels: Tensor | None = None  # (F,): the expert of each neuron, where the model is a mixture


def sites(model: Any) -> list[Site]:
    """One per layer. A dense layer's neurons are relu(pre-activation) of the gate, or of the up projection without one. In
    a mixture the experts' neurons stand side by side, and one that a token was not sent to is 0 for it."""
    anatomy = Anatomy(model)
    stack = "encoder" if any(b.stack == "encoder" for b in anatomy.blocks) else "decoder"
    blocks = [b for b in anatomy.blocks if b.stack == stack]
    found = [_dense(model, anatomy, b) for b in blocks if "ffn.down" in b.parts]
    if any("router" in b.parts for b in blocks):
        at = {path.rpartition(".")[0]: router for path, router in routers(model)}
        for b in blocks:
            inside = [p for p in at if p.startswith(b.path + ".")]
            found += [_sparse(model, b, inside[0], at[inside[0]])] if inside else []
    return sorted(found, key=lambda s: s.layer)


def _dense(model: Any, anatomy: Anatomy, b: Block) -> Site:
    ffn = anatomy.ffn(b)
    view = ffn.gate or ffn.up
    module = model.get_submodule(view.name.rpartition(".")[0])
    down = b.parts["ffn.down"]
    neurons = down.shape[0] if down.orientation == "in_out" else down.shape[1]

    def read(args: tuple, output: Any) -> Tensor:
        y = output.reshape(-1, output.shape[-1])
        return (y if not view.slices else torch.cat([y[:, s] for s in view.slices], 1)).relu()

    return Site(b.index, neurons, module, read)


def _sparse(model: Any, b: Block, path: str, router: Any) -> Site:
    experts = model.get_submodule(path + ".experts")
    weight = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, Tensor) or weight.shape[2] != router.weight.shape[-1]:
        raise UserError(f"the experts of {b.path} are stored in a way that is not known here", "they have no gate_up_proj (E, 2F, d)")
    gate = weight[:, : weight.shape[1] // 2]  # (E, F, d)

    def read(args: tuple, output: Any) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1])
        index = output[2].reshape(len(x), -1)
        found = x.new_zeros(len(x), len(gate), gate.shape[1])
        for e in range(len(gate)):
            sent = (index == e).any(1)
            found[sent, e] = (x[sent] @ gate[e].T).relu()
        return found.flatten(1)

    neurons = gate.shape[0] * gate.shape[1]
    return Site(b.index, neurons, router, read, torch.arange(gate.shape[0]).repeat_interleave(gate.shape[1]))


@contextmanager
def _seen(found: list[Site]) -> Iterator[dict[Any, Any]]:
    """Hooks that keep, for `now["mask"]` (B, T), the largest activation (B, F) of each example in `now[layer]`."""
    now: dict[Any, Any] = {}

    def hook(site: Site) -> Any:
        def visit(module: nn.Module, args: tuple, output: Any) -> None:
            mask = now["mask"].bool()
            values = site.read(args, output).detach().view(*mask.shape, -1)
            now[site.layer] = values.masked_fill(~mask[..., None], 0.0).amax(1).float().cpu()

        return visit

    handles = [s.module.register_forward_hook(hook(s)) for s in found]
    try:
        yield now
    finally:
        for h in handles:
            h.remove()


@torch.no_grad()
def activations(model: Any, examples: list[list[int]], found: list[Site], batch: int = 8) -> dict[int, np.ndarray]:
    """By layer the largest activation of each neuron over an example's tokens, (n, F) fp32. Padding does not count."""
    out = {s.layer: np.zeros((len(examples), s.neurons), np.float32) for s in found}
    with _seen(found) as now:
        for start, ids, mask in batches(examples, batch):
            now["mask"] = mask.to(model.device)
            run(model, ids.to(model.device), now["mask"])
            for layer, values in out.items():
                values[start : start + len(ids)] = now[layer].numpy()
    return out


def predict(model: Any, function: SubFunction, found: list[Site], batch: int = 8) -> dict[int, np.ndarray]:
    """By layer the predictivity of every neuron for a sub-function (F,). As many layers at a time as memory should hold."""
    scores, todo = {}, list(found)
    while todo:
        part: list[Site] = []
        while todo and (not part or len(function.ids) * sum(s.neurons for s in (*part, todo[0])) <= _VALUES):
            part.append(todo.pop(0))
        for layer, values in activations(model, function.ids, part, batch).items():
            scores[layer] = predictivity(values, function.labels)
    return scores


def batches(examples: list[list[int]], batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where each batch starts, its ids (B, T) padded with 0 on the right, and its mask."""
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        longest = max(map(len, part))
        yield (
            start,
            torch.tensor([e + [0] * (longest - len(e)) for e in part]),
            torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in part]),
        )


def run(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """One forward pass; of an encoder-decoder the encoder alone."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()(input_ids=ids, attention_mask=mask)
    return model(input_ids=ids, attention_mask=mask)
