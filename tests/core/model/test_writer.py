"""Saving: whole or not at all, whatever kills it; the same bytes in whatever order; nothing left behind when it fails."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model import writer
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Blueprint, Built, natural, staging, write_model, write_tensors
from modelwright.reshape.upcycle import Knobs, upcycle
from modelwright.runner.run import run

Tiny = Callable[..., Path]
SHARD = 30_000  # bytes: several shards out of a tiny model


def blueprint(base: Path, **knobs: Any) -> Blueprint:
    return upcycle(Checkpoint(base), Knobs(**{"experts": 4, "method": "drop", **knobs}), seed=3)[0]


def save(plan: Blueprint, to: Path, shard_size: int = SHARD) -> None:
    with staging(to) as part:
        write_tensors(plan, part, shard_size)


def upcycled(base: Path, to: Path, experts: int = 4) -> None:
    run("reshape.upcycle", base=base, to=to, experts=experts, method="drop", save={"certificate": "structure"})


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those that hold times."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("modelwright.json", "report.json", "report.html", "done.json")
    }


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- killed at any moment --------------------------------------------------------------------------------------------
def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child of this process, where everything is imported already; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of the child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watched(work: Callable[[], None], root: Path, at: Callable[[int], None]) -> None:
    """Run `work` and call `at(i)` before its i-th change of the file system below `root`. For a child: it cannot be undone."""
    counter = itertools.count()  # its next() is one step for the writing threads too

    def step() -> None:
        at(next(counter))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in ("os.remove", "os.rmdir") or (writes or event in ("os.mkdir", "os.rename")) and str(args[0]).startswith(str(root)):
            step()  # what is removed goes by a name relative to its folder

    pwrite = os.pwrite

    def counted(*args: Any) -> int:
        step()
        return pwrite(*args)

    sys.addaudithook(hook)
    os.pwrite = counted  # type: ignore[assignment]
    work()


@pytest.fixture
def reference(stories: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    upcycled(stories, tmp_path / "reference")
    return content(tmp_path / "reference")


def is_absent_or_whole(to: Path, reference: dict[str, bytes]) -> None:
    if to.exists():
        assert content(to) == reference
        assert Checkpoint(to).model().num_parameters() > 260_032


@pytest.mark.slow
def test_killed_at_a_random_moment_leaves_nothing_or_everything(stories: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    times = []
    for i in range(2):
        began = time.perf_counter()
        assert ended(fork(lambda to=tmp_path / f"whole{i}": upcycled(stories, to))) == 0
        times.append(time.perf_counter() - began)
    draw, killed = random.Random(0), 0
    for i in range(20):
        to = tmp_path / str(i) / "out"
        child = fork(lambda to=to: upcycled(stories, to))
        time.sleep(max(times) * (i + draw.random()) / 20)
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        is_absent_or_whole(to, reference)
        upcycled(stories, to)
        assert content(to) == reference
    assert killed  # some of them were really stopped


def test_killed_before_any_step_on_disk_leaves_nothing_or_everything(stories: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    """Every mkdir, open, write, rename and remove of the run is once the one that does not happen any more."""
    tally = tmp_path / "tally"
    with open(tally, "wb", buffering=0) as file:
        child = fork(lambda: watched(lambda: upcycled(stories, tmp_path / "whole"), tmp_path, lambda i: file.write(b".") and None))
        assert ended(child) == 0
    steps = tally.stat().st_size
    assert steps > 30
    points = {round(i * (steps - 1) / 9) for i in range(10)} | set(range(steps - 12, steps))  # some along the way, all at the end
    left = {}
    for i in sorted(points):
        to = tmp_path / str(i) / "out"
        to.parent.mkdir()
        die = lambda n, i=i: os.kill(os.getpid(), signal.SIGKILL) if n == i else None  # noqa: E731
        child = fork(lambda to=to, die=die: watched(lambda: upcycled(stories, to), tmp_path, die))
        assert ended(child) == -signal.SIGKILL
        is_absent_or_whole(to, reference)
        upcycled(stories, to)
        assert content(to) == reference
        if names(to.parent) != ["out"]:
            left[i] = names(to.parent)
    assert not left, f"work left beside the result after a kill before step n of {steps}: {left}"


def test_target_appears_in_one_step(tiny: Tiny, tmp_path: Path) -> None:
    to, plan = tmp_path / "out", blueprint(tiny("llama"))

    def watched_stream() -> Iterator[Any]:
        for piece in plan.stream():
            assert not to.exists()
            yield piece

    save(replace(plan, stream=watched_stream), to)
    assert names(tmp_path) == ["out"] and not (to / "INCOMPLETE").exists()


def test_leftover_of_a_dead_process_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    part = tmp_path / "out.incomplete"
    part.mkdir()
    (part / "junk").write_text("x")
    (part / "INCOMPLETE").write_text(f"{fork_and_end()}\n")
    save(blueprint(tiny("llama")), tmp_path / "out")
    assert names(tmp_path) == ["out"] and not (tmp_path / "out" / "junk").exists()


def fork_and_end() -> int:
    pid = fork(lambda: None)
    ended(pid)
    return pid


def test_folder_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    part = tmp_path / "out.incomplete"
    part.mkdir()
    (part / "INCOMPLETE").write_text(f"{os.getppid()}\n")
    with pytest.raises(UserError, match=f"being written by process {os.getppid()}"), staging(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["out.incomplete"] and names(part) == ["INCOMPLETE"]


@pytest.mark.parametrize("recipe", ["the same", "another"])
@pytest.mark.parametrize("at", [4, 60])
def test_second_run_leaves_the_first_one_alone(stories: Path, tmp_path: Path, reference: dict[str, bytes], recipe: str, at: int) -> None:
    """The first run stands still in the middle of its work; the second one is refused; the first one ends well."""
    to = tmp_path / "out"
    halt = lambda n: os.kill(os.getpid(), signal.SIGSTOP) if n == at else None  # noqa: E731
    child = fork(lambda: watched(lambda: upcycled(stories, to), tmp_path, halt))
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]) and not to.exists()
        with pytest.raises(UserError, match=f"process {child}"):
            upcycled(stories, to, experts=4 if recipe == "the same" else 8)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        ended(child)
        raise
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    assert content(to) == reference and names(tmp_path) == ["out", "reference"]


# ---- the same bytes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "granite", "qwen2"])  # Mixtral, Granite-MoE with slices, Qwen2-MoE with a shared expert
def test_bytes_do_not_depend_on_the_order_of_the_stream(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    plan = blueprint(tiny(kind))
    save(plan, tmp_path / "plain")
    plain = content(tmp_path / "plain")
    assert sum(n.endswith(".safetensors") for n in plain) > 2
    for seed in range(3):
        pieces = list(plan.stream())
        random.Random(seed).shuffle(pieces)
        save(replace(plan, stream=lambda pieces=pieces: pieces), tmp_path / str(seed))
        assert content(tmp_path / str(seed)) == plain


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen2", "phi3"])
def test_bytes_do_not_depend_on_the_source_s_shards(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    for shard in ("5GB", "20KB", "40KB"):
        save(blueprint(tiny(kind, shard=shard)), tmp_path / shard)
    assert content(tmp_path / "5GB") == content(tmp_path / "20KB") == content(tmp_path / "40KB")


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen2"])
@pytest.mark.parametrize("shard_size", [1, SHARD, 10**9])
def test_values_do_not_depend_on_the_shard_size(tiny: Tiny, tmp_path: Path, kind: str, shard_size: int) -> None:
    plan = blueprint(tiny(kind))
    save(plan, tmp_path / "out", shard_size)
    saved, expected = Checkpoint(tmp_path / "out"), {}
    for name, tensor, *index in plan.stream():
        expected[name, *index] = tensor
    for (name, *index), tensor in expected.items():
        found = saved.get(name)
        assert torch.equal(found[index[0]] if index else found, tensor)
    assert {n for n, *_ in expected} == set(saved.table)
    for file in saved.files:
        sizes = [t.nbytes for t in load_file(file).values()]
        assert len(sizes) == 1 or sum(sizes) <= shard_size
    if len(saved.files) > 1:
        index_file = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index_file["metadata"]["total_size"] == sum(saved.get(n).nbytes for n in saved.table)


@pytest.mark.parametrize("shard_size", [SHARD, 10**9])
def test_tensors_lie_in_the_order_of_their_layers(tiny: Tiny, tmp_path: Path, shard_size: int) -> None:
    save(blueprint(tiny("llama", num_hidden_layers=11)), tmp_path / "out", shard_size)
    table = Checkpoint(tmp_path / "out").table  # shard by shard, each in the order of its header
    layers = [int(n.split(".")[2]) for n in table if n.startswith("model.layers.")]
    assert layers == sorted(layers) and list(table) == sorted(table, key=natural)


def test_short_writes_are_completed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, pwrite = blueprint(tiny("llama")), os.pwrite
    save(plan, tmp_path / "plain")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:999], at))
    save(plan, tmp_path / "short")
    assert content(tmp_path / "short") == content(tmp_path / "plain")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ticks_add_up_to_the_bytes_that_were_promised(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    plan, ticks = blueprint(tiny("llama", dtype=dtype)), []
    with staging(tmp_path / "out") as part:
        write_tensors(plan, part, 10**9, ticks.append)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(ticks) == sum(t.nbytes for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}


def test_companions_travel_with_the_weights(stories: Path, tmp_path: Path) -> None:
    save(blueprint(stories), tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


def test_layer_two_comes_before_layer_ten() -> None:
    assert sorted(["a.10.b", "a.2.b", "a.b", "b"], key=natural) == ["a.2.b", "a.10.b", "a.b", "b"]


# ---- a method's mistakes ---------------------------------------------------------------------------------------------
def drop_last(pieces: list[Any]) -> list[Any]:
    return pieces[:-1]


def repeat_first(pieces: list[Any]) -> list[Any]:
    return [*pieces, pieces[0]]


def other_shape(pieces: list[Any]) -> list[Any]:
    return [(pieces[0][0], pieces[0][1][1:]), *pieces[1:]]


def other_type(pieces: list[Any]) -> list[Any]:
    return [(pieces[0][0], pieces[0][1].double()), *pieces[1:]]


def unknown_name(pieces: list[Any]) -> list[Any]:
    return [*pieces, ("wobble", pieces[0][1])]


def slices(pieces: list[Any]) -> list[int]:
    name = next(p[0] for p in pieces if len(p) == 3)
    return [i for i, p in enumerate(pieces) if p[0] == name]


def one_slice_twice(pieces: list[Any]) -> list[Any]:
    """Expert 1 arrives twice and expert 0 never: the bytes add up."""
    first, second = slices(pieces)[:2]
    pieces[first] = pieces[second]
    return pieces


def slice_beyond_the_end(pieces: list[Any]) -> list[Any]:
    """Expert 4 of 4: its place belongs to the next tensor."""
    first = slices(pieces)[0]
    pieces[first] = (*pieces[first][:2], 4)
    return pieces


def negative_slice(pieces: list[Any]) -> list[Any]:
    first = slices(pieces)[0]
    pieces[first] = (*pieces[first][:2], -1)
    return pieces


@pytest.mark.parametrize(
    "fault", [drop_last, repeat_first, other_shape, other_type, unknown_name, one_slice_twice, slice_beyond_the_end, negative_slice]
)
def test_stream_that_does_not_fit_the_plan_raises_and_leaves_nothing(tiny: Tiny, tmp_path: Path, fault: Callable[[Any], Any]) -> None:
    plan = blueprint(tiny("granite"))
    with pytest.raises((RuntimeError, KeyError)):
        save(replace(plan, stream=lambda: fault(list(plan.stream()))), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [lambda d: d | {"wobble": torch.float32}, lambda d: dict(list(d.items())[1:])])
def test_names_that_the_stock_class_does_not_have_raise(tiny: Tiny, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    plan = blueprint(tiny("llama"))
    with pytest.raises(RuntimeError, match="disagree"):
        save(replace(plan, dtypes=change(plan.dtypes)), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_that_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(UserError, match="model.norm.weight"), staging(tmp_path / "out") as part:
        write_model(Built(model), part, 10**9)
    assert names(tmp_path) == []


# ---- targets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["staging", "run"])
@pytest.mark.parametrize("what", ["file", "empty folder", "folder", "link"])
def test_target_that_exists_is_refused_and_untouched(tiny: Tiny, tmp_path: Path, way: str, what: str) -> None:
    to = tmp_path / "out"
    if what == "file":
        to.write_text("mine")
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        to.symlink_to(tmp_path / "elsewhere")
    else:
        to.mkdir()
    if what == "folder":
        (to / "config.json").write_text("mine")
    before = names(tmp_path), content(tmp_path), to.stat().st_mtime_ns
    with pytest.raises(UserError, match=f"{to} exists already"):
        save(blueprint(tiny("llama")), to) if way == "staging" else upcycled(tiny("llama"), to)
    assert (names(tmp_path), content(tmp_path), to.stat().st_mtime_ns) == before


@pytest.mark.parametrize("way", ["staging", "run"])
@pytest.mark.parametrize(
    "path",
    ["file/out", "file/deep/out", "n" * 252, "n" * 300],
    ids=["below a file", "deep below a file", "name too long for staging", "name too long"],
)
def test_target_that_cannot_be_written_is_refused(tiny: Tiny, tmp_path: Path, way: str, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as caught:
        save(blueprint(tiny("llama")), tmp_path / path) if way == "staging" else upcycled(tiny("llama"), tmp_path / path)
    assert "is no path" in str(caught.value) or path.split("/")[0] in str(caught.value)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [ValueError("x"), UserError("x"), OSError(errno.EIO, "x"), KeyboardInterrupt(), Stop()])
def test_exception_within_staging_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staging(tmp_path / "out") as part:
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


# ---- no space --------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(bytes) -> an empty file system of that size."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        at = tmp_path / f"disk{len(mounted)}"
        at.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        mounted.append(at)
        return at

    try:
        yield mount
    finally:
        for at in mounted:
            subprocess.run(["umount", "-l", str(at)], check=True)


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(free * 2, free, free))


def test_disk_that_is_too_small_is_seen_before_writing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, wrote = blueprint(tiny("llama")), []
    pretend(monkeypatch, 100_000)
    monkeypatch.setattr(os, "pwrite", lambda *a: wrote.append(a))
    with pytest.raises(UserError, match="no disk space.*0 MB are free"):
        save(plan, tmp_path / "out")
    assert names(tmp_path) == [] and not wrote


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("way", ["staging", "run"])
def test_disk_that_fills_up_midway_leaves_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, way: str) -> None:
    calls, pwrite = [], os.pwrite

    def full(fd: int, data: Any, at: int) -> int:
        calls.append(at)
        if len(calls) > 9:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no disk space left for"):
        save(blueprint(tiny("llama")), tmp_path / "out") if way == "staging" else upcycled(tiny("llama"), tmp_path / "out")
    assert len(calls) > 9 and names(tmp_path) == []


def test_real_small_disk_is_seen_before_writing(tiny: Tiny, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(300_000)
    with pytest.raises(UserError, match="no disk space"):
        upcycled(tiny("llama"), disk / "out")
    assert names(disk) == []


@pytest.mark.parametrize("size", [4_096, 65_536, *range(204_800, 246_000, 8_192)])
def test_real_disk_that_another_process_fills_leaves_nothing(
    tiny: Tiny, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The space was there when it was asked for; the result needs about 220 kB, so it runs out at another file each time."""
    disk = small_disk(size)
    pretend(monkeypatch, 10**12)
    try:
        upcycled(tiny("llama"), disk / "out")
    except UserError as error:
        assert "no disk space" in str(error)
        left = [p for p in disk.rglob("*") if p.is_file()]
        assert not left or (disk / "out.run" / "0-reshape.upcycle" / "done.json").is_file(), "nothing, or the step that was finished"
    else:
        assert names(disk) == ["out"]
        Checkpoint(disk / "out").model()


def test_real_small_disk_refuses_a_model_made_in_memory(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(65_536)
    with pytest.raises(UserError, match="no disk space"), staging(disk / "out") as part:
        write_model(Built(model_of("llama")), part, 10**9)
    assert names(disk) == []


def test_disk_errors_that_nobody_can_mend_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="input/output"), writer.disk_errors(tmp_path):
        raise OSError(errno.EIO, "input/output error")
