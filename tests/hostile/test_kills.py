"""Runs that are killed, that meet a full disk or another run: the next try gives the bytes of the unbroken run, or says why not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modelwright
from modelwright import UserError
from modelwright.runner.recipe import parse
from modelwright.runner.run import run_recipe
from modelwright.testing import made

TRAIN = {"tokens": 400, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 1, "warmup": 0.0, "eval_every": 4}


def steps_of(kind: str, data: Path) -> list[dict[str, Any]]:
    """The steps of a recipe of each kind."""
    ids = made("tokens", data)["data"]
    return {
        "reshape": [{"reshape.upcycle": {"experts": 4, "top_k": 2}}],
        "tune": [{"tune.hft": {"data": ids, "train": TRAIN}}],
        "adapters": [{"tune.lora": {"data": ids, "train": TRAIN}}],
        "curate": [{"curate.rules": {"data": made("text", data / "text")["data"], "use": []}}],
        "measure": [{"judge.select": {**made("chains", data), "n": 8}}],
        "chain": [{"reshape.grow": {"operator": "zero", "depth": 2}}, {"tune.new_blocks": {"data": ids, "train": TRAIN}}],
    }[kind]


def child(recipe: Any) -> int:
    """Start a run in a process of its own; a fork, so that nothing is imported again."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            run_recipe(recipe)
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return pid


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a result that do not tell the time."""
    told = ("report.json", "report.html", "modelwright.json", "README.md", "dynamics.parquet", "done.json", "log.jsonl")
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in told}


@pytest.fixture
def recipe(tiny: Any, tmp_path: Path) -> Callable[[str, str], Any]:
    data = tmp_path / "data"

    def make(kind: str, to: str) -> Any:
        base = None if kind in ("curate", "measure") else str(tiny("llama"))
        return parse(
            {"name": kind, "base": base, "steps": steps_of(kind, data), "save": {"to": str(tmp_path / to), "certificate": "structure"}}
        )

    return make


@pytest.mark.parametrize(
    "kind", ["reshape", "tune", "curate", *(pytest.param(k, marks=pytest.mark.slow) for k in ("adapters", "measure", "chain"))]
)
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_the_unbroken_one(kind: str, recipe: Any, tmp_path: Path) -> None:
    run_recipe(recipe(kind, "whole"))
    began, draw, killed = time.perf_counter(), random.Random(kind), 0  # noqa: S311
    assert os.waitstatus_to_exitcode(os.waitpid(child(recipe(kind, "timed")), 0)[1]) == 0
    took = time.perf_counter() - began
    for i in range(12):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # it was faster than the kill
        pid = child(recipe(kind, "out"))
        time.sleep(draw.uniform(0.02, 0.9) * took * 0.8**i)
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if killed == 3:
            break
    run_recipe(recipe(kind, "out"))
    assert killed, "no kill came in time"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("out.*")), "nothing is left beside the result"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes) mounts a file system in memory, or makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def size(kilobytes: int) -> Path:
        nonlocal mounted
        how = f"remount,size={kilobytes}k" if mounted else f"size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        mounted = True
        return place

    yield size
    if mounted:
        subprocess.run(["umount", str(place)], check=False)


@pytest.mark.parametrize("kind", ["tune", "curate", *(pytest.param(k, marks=pytest.mark.slow) for k in ("reshape", "chain"))])
def test_a_full_disk_is_one_sentence_and_a_larger_one_ends_the_run(kind: str, recipe: Any, small_disk: Any, tmp_path: Path) -> None:
    run_recipe(recipe(kind, "whole"))
    needs = sum(len(b) for b in contents(tmp_path / "whole").values()) // 1024
    small_disk(max(8, needs // 2))
    with pytest.raises(UserError, match="disk|space"):
        run_recipe(recipe(kind, "disk/out"))
    assert not (tmp_path / "disk" / "out").exists()
    small_disk(64 * 1024)
    run_recipe(recipe(kind, "disk/out"))
    assert contents(tmp_path / "disk" / "out") == contents(tmp_path / "whole")


def test_two_runs_into_one_folder_do_not_mix(recipe: Any, tmp_path: Path) -> None:
    first = child(recipe("tune", "out"))
    while not (tmp_path / "out.run" / "process").is_file() or not (tmp_path / "out.run" / "process").read_text().strip():
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)  # it stays in the middle
    try:
        with pytest.raises(UserError, match=f"process {first}"):
            run_recipe(recipe("tune", "out"))
    finally:
        os.kill(first, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    run_recipe(recipe("tune", "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_command_killed_with_all_it_started_goes_on(seed: int, tiny: Any, tmp_path: Path) -> None:
    argv = ["tune", "full", "--base", str(tiny("llama")), "--data", made("tokens", tmp_path)["data"], "--json"]
    argv += [f"--train.{k.replace('_', '-')}={v}" for k, v in TRAIN.items()]
    draw = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "modelwright", *argv, "--to"]
    run = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while run.poll() is None and not (tmp_path / "out.run").exists():
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 3))
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    for name in ("out", "whole"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["to"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_public_call_is_taken_up_too(tiny: Any, tmp_path: Path) -> None:
    arguments = {"base": tiny("llama"), "train": TRAIN, **made("tokens", tmp_path)}
    pid = os.fork()
    if pid == 0:
        try:
            modelwright.run("tune.full", to=tmp_path / "out", **arguments)
        finally:
            os._exit(0)
    while not list(tmp_path.glob("out.run/*/checkpoint-*/complete.json")) and not (tmp_path / "out").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for name in ("out", "whole"):
        modelwright.run("tune.full", to=tmp_path / name, **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
