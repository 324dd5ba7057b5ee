"""KNIFE, map-tuning and ERNIE-Code: two processes are one, under DDP and FSDP2, accumulated and recomputed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import teaching
import torch

import tiny_bert
import tiny_t5
from modelwright.testing import made
from small import far

pytestmark = pytest.mark.slow  # every case trains in two processes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    given = {kind: made(kind, folder / kind) for kind in ("questions", "entities", "translations")}
    for kind, settings in given.items():
        (folder / f"{kind}.json").write_text(json.dumps(settings))
    texts = {
        k: [" ".join(map(str, json.loads(r).values())) for r in Path(given[k]["data"]).read_text().splitlines()] for k in list(given)[:2]
    }
    tiny_t5.saved(folder / "t5", texts["questions"])
    tiny_bert.saved(folder / "bert", [*texts["entities"], "/ " * 40])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Every case trained by two processes, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(__file__).with_name("teaching.py")), str(folder), str(data), "2"]
    done = subprocess.run([*command, *script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", teaching.CASES)
def test_two_processes_are_one(name: str, strategy: str, two: Path, data: Path, tmp_path: Path) -> None:
    one, both = teaching.one(name, tmp_path, data), torch.load(two / f"{strategy} {name}.pt", weights_only=True)
    assert one["tokens"] == both["tokens"] and one["liveness"] == both["liveness"]
    assert torch.allclose(torch.tensor(one["evals"]), torch.tensor(both["evals"]), atol=1e-4)
    assert one["weights"].keys() == both["weights"].keys() and far(both["weights"], one["weights"]) < 1e-4
