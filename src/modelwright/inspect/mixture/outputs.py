"""How alike the experts' outputs are on a text (measures D1 to D4 of arXiv 2406.18219).

The model runs as it always does; at each sparse layer ALL experts are also applied to the layer's true input.
D1 output:  angular similarity 1 - acos(cos) / pi of two experts' outputs, averaged over tokens; and the mean cosine.
D2 norm:    rank of an expert's output norm against rank of its router score, counted over tokens (E, E).
D3 hidden:  size of act(gate x) by expert and neuron.
D4 chosen:  which experts each token was sent to.

Experts are called through their own module, so that any way to store or run them works. Tokens are taken a part at a
time, and the cosines of all pairs come from one product of the outputs with themselves; padding is left out.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import Rows, collate
from modelwright.moe.watch import routers

_VALUES = 1 << 22  # outputs held at a time


@dataclass
class LayerOutputs:
    """Sums over the tokens of one layer."""

    members: list[str]
    experts: int
    tokens: int = 0
    angle: Tensor = field(default_factory=lambda: torch.zeros(0))  # (m, m), summed
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0))
    norm: Tensor = field(default_factory=lambda: torch.zeros(0))  # (m,), summed
    ranks: Tensor = field(default_factory=lambda: torch.zeros(0))  # (E, E): norm rank x score rank
    load: Tensor = field(default_factory=lambda: torch.zeros(0))  # (E,): slots
    hidden: Tensor | None = None  # (E, F), summed |act(gate x)|
    chosen: list[list[int]] = field(default_factory=list)  # of the first tokens

    def __post_init__(self) -> None:
        m, e = len(self.members), self.experts
        self.angle, self.cosine = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, m, dtype=torch.float64)
        self.norm, self.load = torch.zeros(m, dtype=torch.float64), torch.zeros(e, dtype=torch.float64)
        self.ranks = torch.zeros(e, e, dtype=torch.long)

    def add(self, outputs: Tensor, scores: Tensor, index: Tensor, keep: int) -> None:
        """Count tokens: outputs (n, m, d) of all members, router scores (n, E), chosen experts (n, k)."""
        angle, cosine = pair_similarity(outputs)
        self.angle += angle.sum(0).cpu()
        self.cosine += cosine.sum(0).cpu()
        norms = outputs.float().norm(dim=2)
        self.norm += norms.sum(0).double().cpu()
        self.ranks += rank_counts(norms[:, : self.experts], scores).cpu()
        self.load += torch.bincount(index.flatten().cpu(), minlength=self.experts).double()
        self.chosen += index[: max(0, keep - len(self.chosen))].tolist()
        self.tokens += len(outputs)

    @property
    def share(self) -> Tensor:
        """Each expert's share of the slots (E,)."""
        return self.load / self.load.sum()

    @property
    def effective(self) -> float:
        """exp of the entropy of the load: how many experts equally used would be as spread out."""
        return math.exp(-float(torch.special.xlogy(self.share, self.share).sum()))


def pair_similarity(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Angular similarity and cosine of each token's outputs (n, m, d): twice (n, m, m). The diagonal is 1."""
    unit = torch.nn.functional.normalize(outputs.double(), dim=2)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1, 1)  # rounding past 1 would make acos nan
    cosine.diagonal(dim1=1, dim2=2).fill_(1.0)
    return 1 - cosine.acos() / math.pi, cosine


def rank_counts(norms: Tensor, scores: Tensor) -> Tensor:
    """(E, E): over tokens (n, E), how often the expert of norm rank r has score rank s; the last rank is the largest."""
    e = norms.shape[1]
    a, b = (x.argsort(dim=1, stable=True).argsort(dim=1) for x in (norms, scores))
    return torch.bincount((a * e + b).flatten(), minlength=e * e).view(e, e)


def block_of(model: nn.Module, router: str) -> Any:
    return model.get_submodule(router.rpartition(".")[0])


def _shared(block: nn.Module) -> nn.Module | None:
    return next((m for n, m in block.named_children() if n in ("shared_expert", "shared_experts")), None)


@contextmanager
def _watching(model: nn.Module, keep: int) -> Iterator[tuple[list[LayerOutputs], dict[str, Any]]]:
    """Hooks on every router; `now["real"]` (B * T,) marks the tokens of the current batch that count."""
    found, handles, now = [], [], {"real": None}  # type: ignore[var-annotated]
    for name, router in routers(model):
        block = block_of(model, name)
        shared, experts = _shared(block), int(router.weight.shape[0])
        record = LayerOutputs([*map(str, range(experts)), *(["shared"] if shared else [])], experts)
        found.append(record)
        handles.append(router.register_forward_hook(_hook(record, block, shared, now, keep)))
    try:
        yield found, now
    finally:
        for h in handles:
            h.remove()


def _hook(record: LayerOutputs, block: Any, shared: nn.Module | None, now: dict[str, Any], keep: int) -> Any:
    def hook(router: nn.Module, args: tuple, output: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])[now["real"]]
        logits, index = output[0].reshape(-1, record.experts)[now["real"]], output[2].reshape(len(now["real"]), -1)[now["real"]]
        step = max(1, _VALUES // (len(record.members) * x.shape[1]))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            outputs = all_outputs(block.experts, x[part], record.experts)
            if shared is not None:
                outputs = torch.cat([outputs, shared(x[part])[:, None]], 1)
            record.add(outputs, logits[part].float(), index[part], keep)
            _add_hidden(record, block.experts, x[part])

    return hook


def all_outputs(experts: Any, x: Tensor, count: int) -> Tensor:
    """Outputs (n, E, d) of all experts for tokens (n, d), each with weight 1."""
    one = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    return torch.stack([experts(x, torch.full((len(x), 1), e, device=x.device), one) for e in range(count)], 1)


def _add_hidden(record: LayerOutputs, experts: Any, x: Tensor) -> None:
    """D3, where the experts are gated and stored as gate above up."""
    weight, act = getattr(experts, "gate_up_proj", None), getattr(experts, "act_fn", None)
    if act is None or not isinstance(weight, Tensor) or weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        return
    sums = torch.stack([act(x @ w[: len(w) // 2].T).abs().sum(0, dtype=torch.float64) for w in weight]).cpu()  # (E, F)
    record.hidden = sums if record.hidden is None else record.hidden + sums


@torch.no_grad()
def look(model: Any, rows: Rows, batch: int = 4, keep: int = 64, tick: Any = lambda n: None) -> list[LayerOutputs]:
    """D1 to D4 of every sparse layer over all rows; chosen experts of the first `keep` tokens."""
    training = model.training
    model.eval()
    with _watching(model, keep) as (found, now):
        for start in range(0, len(rows), batch):
            part = collate([rows[i] for i in range(start, min(start + batch, len(rows)))])
            now["real"] = part["real"].flatten().to(model.device)
            inputs = {k: part[k].to(model.device) for k in ("input_ids", "attention_mask", "position_ids") if k in part}
            model(**inputs, use_cache=False)
            tick(int(part["real"].sum()))
    model.train(training)
    return found
