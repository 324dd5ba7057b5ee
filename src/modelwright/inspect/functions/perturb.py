"""Disturb chosen neurons and see what a function loses (arXiv 2305.18390, section on perturbation).

The chosen neurons' activations are replaced by a random permutation of their own values over batch, tokens and neurons,
times `scale` (4 in the official code). The paper measures a classifier's accuracy; for a decoder without one we measure
the rise of the next-token loss on the function's own texts (label 1) [ours].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.core.model.anatomy import Anatomy
from modelwright.inspect.functions.examples import batches


def choose(scores: dict[int, np.ndarray], share: float) -> dict[int, np.ndarray]:
    """The `share` of all neurons with the highest score, by layer; ties go to the lower layer and index."""
    flat = np.concatenate(list(scores.values()))
    order = np.argsort(-flat, kind="stable")[: max(1, int(len(flat) * share))]
    return _by_layer(order, scores)


def choose_random(chosen: dict[int, np.ndarray], scores: dict[int, np.ndarray], seed: int) -> dict[int, np.ndarray]:
    """As many neurons in each layer as `chosen` has, drawn at random: layers differ in what a disturbance costs."""
    rng = np.random.default_rng(seed)
    return {layer: np.sort(rng.permutation(len(s))[: len(chosen[layer])]) for layer, s in scores.items()}


def choose_experts(scores: dict[int, np.ndarray], labels: dict[int, np.ndarray], share: float) -> dict[int, np.ndarray]:
    """About as many neurons in whole experts: those of highest mean score, as long as they do not exceed the number."""
    total = sum(map(len, scores.values()))
    room, found = max(1, int(total * share)), {layer: np.zeros(0, np.int64) for layer in scores}
    means = [(-float(s[labels[layer] == e].mean()), layer, e) for layer, s in scores.items() for e in np.unique(labels[layer])]
    for _, layer, e in sorted(means):
        members = np.flatnonzero(labels[layer] == e)
        if len(members) <= room:
            found[layer] = np.append(found[layer], members)
            room -= len(members)
    return found


def _by_layer(order: np.ndarray, scores: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    found, start = {}, 0
    for layer, s in scores.items():
        found[layer] = np.sort(order[(order >= start) & (order < start + len(s))] - start)
        start += len(s)
    return found


@contextmanager
def disturbed(model: Any, neurons: dict[int, np.ndarray], scale: float = 4.0, seed: int = 0) -> Iterator[None]:
    """Inside the block the chosen neurons (by layer) of a dense model give shuffled values."""
    anatomy = Anatomy(model)
    g = torch.Generator().manual_seed(seed)
    handles: list[Any] = []

    def hook(index: Tensor) -> Any:
        def change(module: nn.Module, args: tuple) -> tuple:
            h = args[0].clone()
            own = h[..., index]
            h[..., index] = scale * own.flatten()[torch.randperm(own.numel(), generator=g).to(h.device)].view_as(own)
            return (h, *args[1:])

        return change

    try:
        for layer, index in neurons.items():
            if len(index):
                module = model.get_submodule(anatomy.ffn(layer).down.name.rpartition(".")[0])
                handles.append(module.register_forward_pre_hook(hook(torch.from_numpy(index).to(model.device))))
        yield
    finally:
        for h in handles:
            h.remove()


@torch.no_grad()
def loss(model: Any, examples: list[list[int]], batch: int = 8) -> float:
    """Mean next-token loss in nats over the tokens of the examples; those of one token say nothing."""
    total, count = 0.0, 0
    for _, ids, mask in batches([e for e in examples if len(e) > 1], batch):
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((each * mask[:, 1:]).sum())
        count += int(mask[:, 1:].sum())
    return total / max(count, 1)
