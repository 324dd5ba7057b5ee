"""SFTMix and SpIEL: two processes are one, under DDP and FSDP2, and a run of two that was stopped is the unbroken one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixed_processes
import pytest
import torch

pytestmark = pytest.mark.slow  # every case trains in two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by two processes, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", mixed_processes.__file__]
    done = subprocess.run([*command, str(folder), "2"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", mixed_processes.CASES)
def test_two_processes_are_one(name: str, two: Path, tmp_path: Path) -> None:
    one: Any = mixed_processes.processes.one(name, tmp_path)
    for strategy in ("ddp", "fsdp2"):
        both = torch.load(two / f"{strategy} {name}.pt", weights_only=True)
        assert one["liveness"] == both["liveness"] and one["facts"] == both["facts"] and one["steps"] == both["steps"]
        assert torch.allclose(torch.tensor(one["evals"]), torch.tensor(both["evals"]), atol=1e-6)
        assert all(float((w - both["weights"][n]).abs().max()) <= 2e-6 for n, w in one["weights"].items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", mixed_processes.RESUMED)
def test_a_run_of_two_that_was_stopped_is_the_unbroken_one(name: str, strategy: str, two: Path) -> None:
    whole, resumed = (torch.load(two / f"{strategy} {name}{end}.pt", weights_only=True) for end in ("", " resumed"))
    assert all(torch.equal(w, resumed["weights"][n]) for n, w in whole["weights"].items()) and whole["evals"] == resumed["evals"]
