"""A run that an outside launcher started (torchrun over two nodes, SLURM) joins its processes instead of starting its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _arguments(tiny: Any, folder: Path, to: str) -> list[str]:
    rows = "".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(16))
    (folder / "ids.jsonl").write_text(rows)
    train = ["--train.batch", "2", "--train.context", "16", "--train.epochs", "1", "--train.lr", "0.001", "--holdout", "0"]
    return ["tune", "full", "--base", str(tiny("llama")), "--data", str(folder / "ids.jsonl"), "--to", to, *train]


@pytest.mark.slow
def test_two_launchers_as_two_nodes_give_the_weights_of_one_process(tiny, tmp_path: Path) -> None:
    code = "import sys; from modelwright.cli.app import main; main(sys.argv[1:])"
    port = _free_port()
    nodes = []
    for rank in range(2):
        env = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", code, *_arguments(tiny, tmp_path, str(tmp_path / "two"))]
        nodes.append(
            subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [n.communicate(timeout=180)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], said
    single = _arguments(tiny, tmp_path, str(tmp_path / "one"))
    single[single.index("--train.batch") + 1] = "4"
    done = subprocess.run([sys.executable, "-c", code, *single], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[n] - two[n]).abs().max()) for n in one) <= 1e-6
    facts = json.loads((tmp_path / "two" / "report.json").read_text())["steps"][0]["facts"]
    assert facts["processes"] == 2


@pytest.mark.slow
def test_bad_input_under_a_launcher_lets_the_others_go(tmp_path: Path) -> None:
    code = "import sys; from modelwright.cli.app import main; main(sys.argv[1:])"
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    port, nodes = _free_port(), []
    for rank in range(2):
        env = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [
            sys.executable,
            "-c",
            code,
            "tune",
            "full",
            "--base",
            "seedling",
            "--data",
            str(tmp_path / "bad.jsonl"),
            "--to",
            str(tmp_path / "o"),
        ]
        nodes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [n.communicate(timeout=180)[0] for n in nodes]
    assert nodes[0].returncode == 2 and "line 2 of" in said[0] and nodes[1].returncode == 0, said


@pytest.mark.parametrize("weights", [True, False])
def test_a_plan_needs_no_weights(weights: bool, tiny, tmp_path: Path) -> None:
    import shutil

    from modelwright.runner.preview import preview
    from modelwright.runner.recipe import parse

    shutil.copytree(tiny("llama"), tmp_path / "base")
    if not weights:
        (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(3, 40))}) + "\n")
    found = preview(parse({"base": str(tmp_path / "base"), "steps": [{"tune.full": {"data": str(tmp_path / "ids.jsonl")}}]}))
    assert ("note" in found[0]) is not weights
    assert "optimizer" in found[1]["memory of one process"] and torch.__version__
