"""Balance losses as pure functions of one layer's scores and counts, and the numbers that tell how balanced it is.

    f = slots of expert e / all slots (no gradient),  P = mean score of expert e,  over real tokens
    switch        E sum_e f_e P_e; 1 at uniform (GShard 2006.16668, Switch 2101.03961). convention "hf": f is per token, k
                  times larger; a coefficient tuned under one is wrong by k under the other.
    global batch  the same with the f of the whole batch, over micro-batches and processes (2501.11873): give it `counts`
    per_sequence  the same inside each sequence, then the mean (DeepSeek-V3, 2412.19437): balance within every document
    z             mean (logsumexp of the logits)^2 (ST-MoE, 2202.08906)
    cv_squared    variance / mean^2 of importance or load (Shazeer, 1701.06538)
    nudge         no loss: a bias of the selection moves by u against the load after each step (2408.15664)

Each is of ONE layer; a model's loss is their mean over layers. transformers averages f and P over the layers first and
multiplies then. Eight layers that each send every token to one expert, each layer to another one, are the worst possible
routing: 8.0 per layer. Pooled they look perfect: 1.0. `pooled` is that formula, kept to show it.

With softmax scores the gradient is dL/dlogit[t, e] = E / T * p[t, e] * (f_e - sum_j p[t, j] f_j).
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from modelwright.core.train import dist

Convention = Literal["switch", "hf"]


def counts_of(index: Tensor, experts: int, real: Tensor | None = None) -> Tensor:
    """Slots per expert of index (..., k), padding excluded: (E,) int64."""
    return (index if real is None else index[real]).flatten().bincount(minlength=experts)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over tokens (T, ...) -> (...); a hole of padding weighs nothing, and no token at all gives 0."""
    if real is None:
        return values.sum(0) / max(len(values), 1)
    mask = real.to(values.dtype)
    return torch.tensordot(mask, values, 1) / mask.sum().clamp(min=1)


def switch(probs: Tensor, counts: Tensor, *, real: Tensor | None = None, k: int = 1, convention: Convention = "switch") -> Tensor:
    """E sum f P of one layer from scores (T, E) and slots per expert (E,); times k under "hf".

    For a global batch give the counts of the whole batch; the mean over its micro-batches, weighted by their tokens, is
    then the loss of the batch unsplit, and so is its gradient.
    """
    f = counts.to(probs.dtype) / counts.sum().clamp(min=1)
    return probs.shape[1] * (f @ _mean(probs, real)) * (k if convention == "hf" else 1)


def pooled(layers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """transformers' loss over (scores, counts) of all layers, "switch" convention: a mistake, see above."""
    p, c = zip(*((probs.mean(0), counts / counts.sum()) for probs, counts in layers), strict=True)
    return len(p[0]) * (torch.stack(p).mean(0) @ torch.stack(c).mean(0))


def per_sequence(probs: Tensor, index: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over sequences of the switch loss inside each; scores (B, S, E), choices (B, S, k), real (B, S)."""
    B, S, E = probs.shape
    mask = torch.ones(B, S, dtype=probs.dtype, device=probs.device) if real is None else real.to(probs.dtype)
    slots = probs.new_zeros(B, E).scatter_add_(1, index.flatten(1), mask.repeat_interleave(index.shape[2], 1))
    f = slots / slots.sum(1, keepdim=True).clamp(min=1)
    P = torch.einsum("bse,bs->be", probs, mask) / mask.sum(1, keepdim=True).clamp(min=1)
    some = mask.any(1).to(probs.dtype)
    return E * ((f * P).sum(1) * some).sum() / some.sum().clamp(min=1)


def z(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of logits (T, E): keeps them small."""
    return _mean(logits.logsumexp(-1).square(), real)


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation (unbiased variance) of importance or load over experts, (E,) -> ()."""
    return values.var() / (values.mean().square() + 1e-10) if len(values) > 1 else values.sum() * 0


def nudge(bias: Tensor, counts: Tensor, rate: float = 1e-3, centred: bool = True) -> Tensor:
    """The selection bias (E,) after one optimizer step: up by `rate` for experts below the mean load, down above it.

    counts are of the global batch. centred: keep the mean of the bias at 0, as it else drifts without bound.
    """
    moved = bias + rate * torch.sign(counts.to(bias).mean() - counts.to(bias))
    return moved - moved.mean() if centred else moved


def recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's second one: then it runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks


class GlobalCounts:
    """Slots per expert and layer over the micro-batches of an optimizer step and over all processes.

    Counts of a recomputed forward pass are not added twice.
    """

    def __init__(self, layers: int, experts: int):
        self.counts = torch.zeros(layers, experts, dtype=torch.long)

    def add(self, layer: int, counts: Tensor) -> None:
        if not recomputing():
            self.counts[layer] += counts.to(self.counts)

    def summed(self) -> Tensor:
        """Over all processes, (layers, E); one collective."""
        return dist.all_sum(self.counts.clone())

    def reset(self) -> None:
        """After the optimizer's step."""
        self.counts.zero_()


def facts(counts: Tensor, num_assignments: Tensor | int | None = None, dropped: Tensor | int = 0) -> dict[str, float]:
    """What every report says of the load (layers, E): worst layer's MaxVio, mean load entropy / ln E, dead experts, share dropped."""
    load = counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1)
    E = counts.shape[1]
    entropy = -torch.special.xlogy(load, load).sum(1) / torch.log(torch.tensor(float(max(E, 2))))
    lost = (
        float(torch.as_tensor(dropped).sum()) / max(float(torch.as_tensor(num_assignments).sum()), 1)
        if num_assignments is not None
        else 0.0
    )
    return {
        "MaxVio": float((load.max(1).values * E - 1).max()),
        "load entropy": float(entropy.mean()),
        "dead experts": int((counts == 0).sum()),
        "dropped share": lost,
    }
