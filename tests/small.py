"""Short training runs of tiny models, for tests of training methods."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.loop import Outcome, fit
from modelwright.core.train.technique import LossTerm, Technique, plain_name
from modelwright.core.train.trainer import forward


class Fatal(Exception):
    """Stands for whatever ends a run from outside."""


def rows(n: int = 8, width: int = 12, ragged: bool = False, seed: int = 1) -> Rows:
    """Random token rows, of one length or of several."""
    g = torch.Generator().manual_seed(seed)
    ids, lengths = torch.randint(3, 90, (n, width), generator=g, dtype=torch.int32), torch.full((n,), width)
    if ragged:
        lengths = torch.randint(3, width + 1, (n,), generator=g)
        ids = torch.where(torch.arange(width) < lengths[:, None], ids, 0)
    return Rows(ids, torch.where(torch.arange(width) < lengths[:, None], ids, IGNORE), lengths)


def go(
    techniques: Technique | list[Technique], model: Any, folder: Path, data: Rows | None = None, stop: int | None = None, **train: Any
) -> Outcome:
    """One training run; raises Fatal at step `stop`."""

    def tick(step: int, of: int) -> None:
        if step == stop:
            raise Fatal

    knobs = Train(**{"batch": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "record": False, **train})
    listed = techniques if isinstance(techniques, list) else [techniques]
    data = rows() if data is None else data
    return fit(model, data, knobs, techniques=listed, evals={}, folder=folder, seed=0, tick=tick)


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def moved(model: Any, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that changed."""
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference of any tensor."""
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-9)) for n in b)


def named(model: Any) -> list[tuple[str, Any]]:
    """Parameters as a technique is shown them."""
    return [(plain_name(n), p) for n, p in model.named_parameters()]


def batches(data: Rows, size: int) -> list[dict[str, Tensor]]:
    """The rows in order, as the model is given them."""
    return [collate([data[i] for i in range(at, min(at + size, len(data)))]) for at in range(0, len(data), size)]


def backward(model: Any, technique: Technique, window: list[dict[str, Tensor]], anatomy: Anatomy | None = None) -> None:
    """The passes of one optimizer step, up to the edited gradient; selects first."""
    technique.select(model, anatomy or Anatomy(model), 0)
    passes(model, technique, window)


def passes(model: Any, technique: Technique, window: list[dict[str, Tensor]]) -> None:
    """The passes of one optimizer step, up to the edited gradient."""
    model.train()
    for m in model.modules():  # no dropout: passes are compared
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    model.zero_grad()
    term = LossTerm()
    for batch in window:
        technique.before_batch(batch)
        (term.sums(batch, forward(model, batch)).sum() / sum(term.count(b) for b in window)).backward()
    technique.on_gradients(named(model))
