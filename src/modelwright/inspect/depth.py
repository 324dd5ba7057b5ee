"""How much each block of a model does: gradient, angular distance, and the loss without it (measures of Mix-LN, 2412.13795).

When to use it: before cutting blocks or growing a model, and to see whether deep blocks learn at all.

- gradient norm: the 2-norm of the loss's gradient over all parameters of a block, nothing clipped.
- angular distance: arccos(cos(x_l, x_{l+n})) / pi between the last token's states before block l and before block l + n, averaged over
  the rows (2403.17887 cuts the n blocks with the smallest).
- loss without a block: the block gives out what it was given; the next-token loss rises by this much.

Official code (pixeli99/MixLN), where it differs: sums in place of means, and a padding token for the last one. Ours: all rows are whole,
so the last token is a real one; a block is passed over in place, so no other block changes its number, its window or its cache.
Gradients and losses are computed in fp32, in evaluation mode. Without data the probe text of the certificates is used.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import probe_ids
from modelwright.core.numbers.stats import spearman
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "text to measure on; empty: the probe text of the certificates")
    rows: int = knob(16, "rows of text, at most", low=1)
    context: int = knob(128, "tokens per row", low=2)
    batch: int = knob(8, "rows per forward pass", low=1)
    gradients: bool = knob(True, "measure gradients, which needs the memory of the weights once more")
    drops: bool = knob(True, "measure the loss without each block")


def depth(knobs: Knobs, job: StepContext) -> EvalResult:
    """The three measures for every block. Raises UserError for a model with an encoder, or a text that is too short."""
    if job.source.hf_config.is_encoder_decoder:
        raise UserError(
            f"{type(job.source.skeleton).__name__} has an encoder and a decoder",
            "text alone has no loss for it",
            "give a decoder-only model",
        )
    ids = _ids(knobs, job)
    model = job.source.model(torch.float32).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = [b.module for b in Anatomy(model).blocks]
    batches = [part.to(model.device) for part in ids.split(knobs.batch)]
    with job.progress.task("inspect.depth", 2 + len(blocks) * knobs.drops) as tick:
        loss, states = states_of(model, blocks, batches)
        tick(1)
        gradients = gradient_norms(model, blocks, batches) if knobs.gradients else None
        tick(1)
        drops = []
        for block in blocks if knobs.drops else []:
            with skipped(block):
                drops.append(mean_loss(model, batches) - loss)
            tick(1)
    return _finding(loss, angles(states), gradients, drops or None, ids)


def _ids(knobs: Knobs, job: StepContext) -> Tensor:
    """Whole rows, (N, T)."""
    if not knobs.data.path:
        return probe_ids(job.source)[0][: knobs.rows, : knobs.context]
    vocab = int(job.source.hf_config.get_text_config().vocab_size)
    found = tokenize(read(knobs.data), job.source.tokenizer(), vocab, knobs.context)
    whole = found.ids[found.lengths == knobs.context] if found.ids.shape[1] == knobs.context else found.ids[:0]
    if not len(whole):
        raise UserError(f"{knobs.data.path} has no {knobs.context} tokens in a row", "only whole rows are measured", "lower the context")
    return whole[np.linspace(0, len(whole) - 1, min(knobs.rows, len(whole))).astype(int)].long()


def _nats(model: Any, ids: Tensor) -> Tensor:
    """Summed next-token loss of a batch."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def _predicted(batches: list[Tensor]) -> int:
    return sum(b.shape[0] * (b.shape[1] - 1) for b in batches)


@torch.no_grad()
def mean_loss(model: Any, batches: list[Tensor]) -> float:
    """Nats per predicted token."""
    return float(sum(_nats(model, b).double().cpu() for b in batches)) / _predicted(batches)


@torch.no_grad()
def states_of(model: Any, blocks: list[nn.Module], batches: list[Tensor]) -> tuple[float, Tensor]:
    """The loss, and the last token's state before each block and after the last one, (L + 1, N, d)."""
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    handles = [b.register_forward_pre_hook(_keep(found[i]), with_kwargs=True) for i, b in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(lambda _, args, out: found[-1].append(_first(out)[:, -1].float().cpu())))
    try:
        loss = mean_loss(model, batches)
    finally:
        for h in handles:
            h.remove()
    return loss, torch.stack([torch.cat(parts) for parts in found])


def _keep(into: list[Tensor]) -> Any:
    return lambda _, args, kwargs: into.append(_given(args, kwargs)[:, -1].float().cpu())


def _given(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def angles(states: Tensor) -> Tensor:
    """Angular distance between the states l and l + n, averaged over rows: (L, L), column n - 1, NaN beyond the last block."""
    unit = F.normalize(states.double(), dim=-1)  # (L + 1, N, d)
    count = len(states) - 1
    found = torch.full((count, count), math.nan, dtype=torch.float64)
    for n in range(1, count + 1):
        cosine = (unit[:-n] * unit[n:]).sum(-1).clamp(-1, 1)
        found[: count + 1 - n, n - 1] = (cosine.acos() / math.pi).mean(1)
    return found


def gradient_norms(model: Any, blocks: list[nn.Module], batches: list[Tensor]) -> list[float]:
    """The norm of the mean loss's gradient over each block's parameters."""
    model.zero_grad()
    for b in batches:
        (_nats(model, b) / _predicted(batches)).backward()
    norms = [math.sqrt(sum(float(p.grad.double().square().sum()) for p in b.parameters() if p.grad is not None)) for b in blocks]
    model.zero_grad()
    return norms


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Let a block give out what it is given."""
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        given[:] = [_given(args, kwargs)]

    def after(_: nn.Module, args: tuple, out: Any) -> Any:
        return (given[0], *out[1:]) if isinstance(out, tuple) else given[0]

    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _finding(loss: float, angle: Tensor, gradients: list[float] | None, drops: list[float] | None, ids: Tensor) -> EvalResult:
    steps = angle[:, 0].tolist()  # the angle that each block turns the state by
    blocks = range(len(steps))
    metrics: dict[str, Any] = {
        "loss": loss,
        "angular_distance": steps,
        "angular_map": [[None if math.isnan(v) else v for v in row] for row in angle.tolist()],
        "distance_along_depth": float(spearman(np.array(steps), np.arange(len(steps)))),  # -1: deep blocks do ever less
    }
    plots: list[dict[str, Any]] = []
    if len(steps) <= 64:
        values, names = metrics["angular_map"], [str(n + 1) for n in blocks]
        plots.append({"kind": "heat", "title": "Angular distance", "x": "blocks passed", "y": "from block", "columns": names,
                      "rows": [str(i) for i in blocks], "values": values})  # fmt: skip
    said = [f"{len(steps)} blocks, {ids.shape[0]} rows of {ids.shape[1]} tokens, {loss:.4f} nats per token."]
    if gradients:
        metrics |= {"gradient_norm": gradients, "gradient_spread": max(gradients) / max(min(gradients), 1e-30)}
        said.append(f"The largest gradient norm of a block is {metrics['gradient_spread']:.3g} times the smallest.")
        plots.insert(0, {"kind": "line", "title": "Gradient norm of each block", "x": "block", "y": "norm",
                         "series": {"gradient norm": [[i, g] for i, g in enumerate(gradients)]}})  # fmt: skip
    if drops:
        order = sorted(blocks, key=drops.__getitem__)
        metrics |= {"loss_without": [loss + d for d in drops], "rise_without": drops, "least_needed": order}
        said.append(
            f"Least is lost without block {order[0]} ({drops[order[0]]:+.4f}), most without block {order[-1]} ({drops[order[-1]]:+.4f})."
        )
        plots.insert(0, {"kind": "bars", "title": "Rise of the loss without a block", "x": "block", "y": "nats per token",
                         "groups": [str(i) for i in blocks], "series": {"rise": drops}})  # fmt: skip
    rows = [[str(i), f"{gradients[i]:.4g}" if gradients else "", f"{steps[i]:.4f}", f"{drops[i]:+.4f}" if drops else ""] for i in blocks]
    columns = ["block", "gradient norm", "angular distance", "rise of the loss without it"]
    return EvalResult(metrics, " ".join(said), tables=[{"title": "Blocks", "columns": columns, "rows": rows}], plots=plots)


METHOD = depth
