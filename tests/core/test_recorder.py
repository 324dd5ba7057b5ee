"""The dynamics table: every example of every step with its own loss, and parts that no kill can lose."""

import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from modelwright.core import recorder as module
from modelwright.core.knobs import Train
from modelwright.core.recorder import SCHEMA, Meter, Recorder, read_dynamics
from modelwright.core.text import IGNORE, Rows
from modelwright.core.training import Outcome, Technique, evaluate_rows, fit


@pytest.fixture(autouse=True)
def _no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine lets itself be asked must not decide a test."""
    monkeypatch.setattr(module.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(Meter, "_nvidia", staticmethod(lambda: []))


def rows() -> Rows:
    """Ten rows of different lengths, each with a different share of masked labels; one has nothing to learn."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 96, (10, 12), generator=g, dtype=torch.int32)
    lengths = torch.randint(4, 13, (10,), generator=g)
    inside = torch.arange(12) < lengths[:, None]
    labels = torch.where(inside & (torch.rand(10, 12, generator=g) < 0.6), ids, IGNORE)
    labels[3] = IGNORE
    return Rows(torch.where(inside, ids, 0), labels, lengths)


def trained(folder: Path, **train: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    from families import model_of

    knobs = Train(**{"batch": 2, "accumulate": 2, "epochs": 2.0, "lr": 1e-2, "warmup": 0.4, "save_every": 2, **train})
    out = fit(model_of("llama"), rows(), knobs, techniques=[Technique()], evals={"new": rows(), "part": rows().split(3)[0]}, folder=folder, seed=0)
    assert out.dynamics
    return out, parquet.read_table(out.dynamics).to_pylist()


@torch.no_grad()
def direct(model: Any, i: int) -> tuple[float, int]:
    """Mean loss and learnt tokens of one row, computed alone and unpadded."""
    data = rows()
    n = int(data.lengths[i])
    labels = data.labels[i, 1:n].long()
    learnt = int((labels != IGNORE).sum())
    logits = model(input_ids=data.ids[i : i + 1, :n].long()).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)) if learnt else 0.0, learnt


def test_every_example_has_one_row_per_pass(tmp_path: Path) -> None:
    out, table = trained(tmp_path)
    train = [r for r in table if r["kind"] == "train"]
    assert out.steps == 5 and sorted(r["example"] for r in train) == sorted([*range(10), *range(10)])


def test_first_step_has_the_losses_of_the_untrained_model(tmp_path: Path) -> None:
    from families import model_of

    model = model_of("llama")
    first = [r for r in trained(tmp_path)[1] if r["kind"] == "train" and r["step"] == 1]
    assert len(first) == 4
    for r in first:
        loss, learnt = direct(model, r["example"])
        assert r["loss"] == pytest.approx(loss, abs=1e-5) and r["tokens"] == learnt
