"""Two processes prune as one does, under DDP and FSDP2: the saved models are the same."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # for torchrun, which starts this file

from families import model_of
from modelwright.core.knobs import Train
from modelwright.core.train import dist
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.tune import dynamic_batch, masks, shear
from modelwright.tune.dynamic_batch import Domains
from small import rows

pytestmark = pytest.mark.slow


def _mix() -> Technique:
    made = dynamic_batch.DynamicBatch(dynamic_batch.Knobs(every=2, references={"a": 3.0, "b": 1.0}))
    made.weights, made.first, made.taken = {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0}
    return made


CASES: dict[str, Callable[[], Technique]] = {
    # with k = E and no balance nothing depends on how tokens are shared out over micro-batches
    "masks": lambda: masks.Masks(masks.Knobs(experts=2, top_k=2, balance=0.0, hard=0.3, ramp=0.3)),
    "shear": lambda: shear.Shear(shear.Knobs(layers=1, heads=2, ffn=24, hidden=24, mask_lr=0.1)),
    "magnitude": lambda: shear.Shear(shear.Knobs(ffn=24, how="magnitude")),
    "dynamic": _mix,
}


def one(name: str, folder: Path, strategy: str) -> dict[str, Tensor]:
    train = Train(batch=8 // dist.world(), lr=1e-4, schedule="constant", warmup=0.0, epochs=4.0, record=False, strategy=strategy)
    data = Domains({"a": rows(8, seed=1), "b": rows(8, seed=2)}, {"a": rows(2, seed=3), "b": rows(2, seed=4)})
    technique = CASES[name]()
    out = fit(model_of("llama"), data, train, techniques=[technique], evals={"new": rows(seed=3)}, folder=folder, seed=0)
    found: dict[str, Any] = {"evals": torch.tensor([e["loss"] for e in out.evals])}
    if not dist.rank():
        found |= {n: p.detach().clone() for n, p in technique.export(out.model, folder).named_parameters()}
    return found


def test_two_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    for name in CASES:
        alone = one(name, tmp_path / name, "ddp")
        for strategy in ("ddp", "fsdp2"):
            both = torch.load(tmp_path / f"{name} {strategy}.pt", weights_only=True)
            assert both.keys() == alone.keys(), (name, strategy)
            assert max(float((both[n] - alone[n]).abs().max()) for n in alone) <= 2e-5, (name, strategy)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(2)
    for name in CASES:
        for strategy in ("ddp", "fsdp2"):
            made = one(name, Path(sys.argv[1]) / f"{name} {strategy}", strategy)
            if not dist.rank():
                torch.save(made, Path(sys.argv[1]) / f"{name} {strategy}.pt")
    dist.end()
