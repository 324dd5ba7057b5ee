"""PPO in two processes is PPO in one: the same responses, rewards, weights and critic, under DDP and FSDP2; resumed to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import ppo_processes
import pytest
import torch

pytestmark = pytest.mark.slow  # every case trains in two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ppo_processes.__file__,
        str(folder),
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", list(ppo_processes.CASES))
def test_two_processes_are_one(name: str, strategy: str, two: Path, tmp_path: Path) -> None:
    one, both = ppo_processes.one(name, tmp_path), torch.load(two / f"{strategy} {name} None.pt", weights_only=True)
    assert one is not None and one["tokens"] == both["tokens"] and len(one["updates"]) == len(both["updates"])
    for a, b in zip(one["updates"], both["updates"], strict=True):
        assert a == pytest.approx(b, abs=2e-3)
    for what in ("weights", "critic"):
        assert one[what].keys() == both[what].keys()
        for n, w in one[what].items():
            assert float((w - both[what][n]).abs().max()) <= 2e-4, n
    for a, b in zip(one["evals"], both["evals"], strict=True):
        assert a == pytest.approx(b, abs=2e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("name", "stop"), [("passes", 3), ("model", 2)])
def test_a_stopped_run_of_two_processes_is_the_unbroken_one(name: str, stop: int, strategy: str, two: Path) -> None:
    whole, resumed = (torch.load(two / f"{strategy} {name} {end}.pt", weights_only=True) for end in (None, stop))
    assert whole["updates"] == resumed["updates"] and whole["evals"] == resumed["evals"]
    assert all(torch.equal(w, resumed[k][n]) for k in ("weights", "critic") for n, w in whole[k].items())
