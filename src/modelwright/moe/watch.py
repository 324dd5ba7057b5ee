"""A RoutingRecord from every forward pass of a stock mixture-of-experts model, through hooks on its routers.

    with watch(model) as seen:
        model(**batch)
    seen.counts                          # (layers, E)
    seen.plots()                         # load per layer, entropy over depth

A router is a module that returns (logits, weights, index), as every one of transformers 5 does. Nothing is patched, and
the hooks are gone after the block. `real` marks padding; give it per batch, or it is read from the model's attention mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.moe.balance import GlobalCounts, counts_of, facts, recomputing
from modelwright.moe.routing import RoutingRecord


def routers(model: nn.Module) -> list[tuple[str, Any]]:
    """The routers of a model in order of depth: modules beside `experts` that hold one row per expert."""
    found = []
    for path, block in model.named_modules():
        if (inner := getattr(block, "experts", None)) is None:
            continue
        for name, child in block.named_children():
            if name in ("gate", "router") and child is not inner:
                found.append((f"{path}.{name}", child))
    if not found:
        raise UserError(f"{type(model).__name__} has no routers", "no module holds experts beside a gate", "give a mixture of experts")
    return found


def shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a model's call."""
    given: Any = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    return tuple(given.shape[:2])  # type: ignore[return-value]


def padding(mask: Any, length: int) -> Tensor | None:
    """Which tokens are real, (B, length) bool, from a call's attention mask, which has cached tokens too; None where it does not say."""
    return mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Seen:
    """What the routers did: the records of the last forward pass, and sums over all of them."""

    def __init__(self, names: list[str], experts: int):
        self.names, self.records = names, [None] * len(names)  # type: list[str], list[Any]
        self.total = GlobalCounts(len(names), experts)
        self.entropy = torch.zeros(len(names), dtype=torch.float64)  # summed over tokens
        self.tokens = torch.zeros(len(names), dtype=torch.long)
        self.real: Tensor | None = None  # (B, T) bool of the current batch

    @property
    def counts(self) -> Tensor:
        """Slots per layer and expert since the start, (layers, E)."""
        return self.total.counts

    def add(self, layer: int, logits: Tensor, weights: Tensor, index: Tensor) -> None:
        if recomputing():
            return
        real = None if self.real is None else self.real.reshape(-1).to(index.device)
        kept = index if real is None else index[real]
        record = RoutingRecord(logits, logits.float().softmax(-1), counts_of(index, logits.shape[1], real), kept.numel(), 0, real, index)
        self.records[layer] = record
        self.total.add(layer, record.counts)
        h = record.entropy()
        self.entropy[layer] += h.sum().double().cpu()
        self.tokens[layer] += len(h)

    def facts(self) -> dict[str, float]:
        """The balance of all that was seen."""
        return facts(self.counts)

    def plots(self) -> list[dict[str, Any]]:
        """Load per layer, and entropy of the scores over depth, for the report."""
        depth = self.entropy / self.tokens.clamp(min=1)
        return [load_plot(self.counts), entropy_plot({"entropy": depth})]


@contextmanager
def watch(model: nn.Module, real: Tensor | None = None) -> Iterator[Seen]:
    """Collect what the model's routers do inside the block; see Seen."""
    found = routers(model)
    seen = Seen([n for n, _ in found], found[0][1].weight.shape[0])
    seen.real = real
    handles: list[Any] = []

    def mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.real = real if real is not None else padding(kwargs.get("attention_mask"), shape(args, kwargs)[1])

    def visit(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen.add(layer, *(t.detach() for t in output[:3]))

        return hook

    try:
        handles.append(model.register_forward_pre_hook(mask, with_kwargs=True))
        handles += [router.register_forward_hook(visit(i)) for i, (_, router) in enumerate(found)]
        yield seen
    finally:
        for h in handles:
            h.remove()


# ---- pictures --------------------------------------------------------------------------------------------------------
def load_plot(counts: Tensor) -> dict[str, Any]:
    """Heat map of each expert's share of a layer's slots, counts (layers, E)."""
    load = counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1)
    return {
        "kind": "heat",
        "title": "Load: share of a layer's slots",
        "x": "expert",
        "y": "layer",
        "columns": list(range(load.shape[1])),
        "rows": list(range(load.shape[0])),
        "values": load.tolist(),
    }


def domain_plot(counts: dict[str, Tensor]) -> dict[str, Any]:
    """Heat map of each domain's use of the experts, all layers together; domain -> counts (layers, E)."""
    share = {n: c.double().sum(0) / c.double().sum().clamp(min=1) for n, c in counts.items()}
    width = len(next(iter(share.values())))
    return {
        "kind": "heat",
        "title": "Which experts each kind of text uses",
        "x": "expert",
        "y": "",
        "columns": list(range(width)),
        "rows": list(share),
        "values": [v.tolist() for v in share.values()],
    }


def entropy_plot(series: dict[str, Tensor]) -> dict[str, Any]:
    """Lines of the routers' mean entropy (nats) over depth; name -> (layers,)."""
    points = {n: [[i, float(v)] for i, v in enumerate(s)] for n, s in series.items()}
    return {"kind": "line", "title": "How undecided the routers are", "x": "layer", "y": "entropy (nats)", "series": points}
