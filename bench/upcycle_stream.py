"""Is upcycling a stream: little more memory than a shard, little more time than a copy of the result?

A Llama of TinyLlama's shape (1.1B parameters, bf16) with random weights becomes a Mixtral of 4 experts, top 2. Every arm
is a process of its own, and the arms take turns:
- ours: Checkpoint, upcycle, write_tensors. Nothing is measured or compared on the way, as a copy does not either.
- the same, but nothing is written: what the process costs before the first tensor moves.
- copy: as many bytes read from the base's files, over and over, and written in blocks of 16 MB. No upcycling can be much
  faster than that.
- mergekit-moe with random gates, the same work by the tool people know: with its shards of 5 GB, and with shards of
  500 MB, because it holds a shard in memory until it is full.

    python bench/upcycle_stream.py [--work FOLDER] [--mergekit-venv FOLDER] [--repetitions 3]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import SHARED, save, spread
from modelwright.core.model.classes import config_of, skeleton

MERGEKIT = "mergekit==0.1.5"
EXPERTS, TOP_K = 4, 2
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Runs a command and reports on it. A process of a few MB, because a child's peak counts from what its parent held when it was started.
LAUNCH = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(pid, 0)
wall = time.perf_counter() - start
os.sync()
with open(sys.argv[1], "w") as f:
    json.dump({"failed": status, "wall": wall, "synced": time.perf_counter() - start, "cpu": used.ru_utime + used.ru_stime,
               "peak": used.ru_maxrss * 1024, "from_disk": used.ru_inblock * 512}, f)
"""

OURS = f"""
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import staging, write_tensors
from modelwright.reshape.upcycle import Knobs, upcycle
imported = time.perf_counter()
source = Checkpoint(sys.argv[1])
blueprint, _ = upcycle(source, Knobs(experts={EXPERTS}, top_k={TOP_K}))
planned = time.perf_counter()
if len(sys.argv) > 2:
    with staging(Path(sys.argv[2])) as folder:
        write_tensors(blueprint, folder, 5_000_000_000)
print(json.dumps([imported - start, planned - imported, time.perf_counter() - planned]))
"""

COPY = """
import sys
from itertools import cycle
from pathlib import Path
to, left = Path(sys.argv[2]), int(sys.argv[3])
to.mkdir()
for i, file in enumerate(cycle(sorted(Path(sys.argv[1]).glob("*.safetensors")))):
    with open(file, "rb", buffering=0) as source, open(to / f"{i}.safetensors", "wb", buffering=0) as copy:
        while left and (block := source.read(min(left, 16 << 20))):
            left -= copy.write(block)
    if not left:
        break
"""


def make_base(folder: Path, shard_size: int = 500_000_000) -> None:
    """The random Llama, shard by shard, with the tokenizer that mergekit insists on."""
    folder.mkdir(parents=True)
    shapes = {n: p.shape for n, p in skeleton(config_of(LLAMA)).state_dict().items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(shapes[n].numel() for n in [*shards[-1], name]) * 2 > shard_size:
            shards.append([])
        shards[-1].append(name)
    generator, index = torch.Generator().manual_seed(0), {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: torch.randn(shapes[n], generator=generator).mul_(0.02).bfloat16() for n in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for file in (SHARED / "stories260K" / "hf").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def install_mergekit(venv: Path) -> str:
    """Put mergekit into a virtual environment, beside the torch that ours uses. Returns why that failed, or ''."""
    if (venv / "bin" / "mergekit-moe").exists():
        return ""
    try:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True, text=True)
        subprocess.run(
            [venv / "bin" / "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", MERGEKIT],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        return (error.stderr or error.stdout or str(error)).strip().splitlines()[-1]
    return ""


def mergekit_versions(venv: Path) -> str:
    code = "from importlib.metadata import version as v; print(*[f'{n} {v(n)}' for n in ('mergekit', 'torch', 'transformers')], sep=', ')"
    return subprocess.run([venv / "bin" / "python", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def memory(what: str) -> int:
    """Bytes, from /proc/meminfo."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(what + ":"))


def read_through(file: Path) -> None:
    with open(file, "rb", buffering=0) as f:
        while f.read(16 << 20):
            pass


def measure(work: Path, reads: Path, command: list[Any]) -> dict[str, Any]:
    """Run a command with memory full, its input in the page cache and no write pending; its costs and the last line it printed.

    Full, of a file without content, because the host of a virtual machine takes back what is free, and memory touched anew
    then costs several times the write to it: arms would be compared by how much of it they meet.
    """
    filler = work / "filler"
    filler.touch()
    os.truncate(filler, memory("MemTotal"))
    for file in (filler, *reads.iterdir()):
        read_through(file)
    os.sync()
    before = {"free": memory("MemFree"), "load": os.getloadavg()[0]}
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(work / "log", "w+") as log:
        launch = [sys.executable, "-S", "-c", LAUNCH, work / "costs"]
        subprocess.run([*launch, *command], check=True, env=env, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        lines = log.read().splitlines()
    costs = json.loads((work / "costs").read_text())
    if costs["failed"]:
        raise RuntimeError(f"{command[:3]} failed:\n" + "\n".join(lines[-20:]))
    return costs | before | {"printed": lines[-1] if lines else ""}


def spot_check(base: Path, result: Path) -> int:
    """Experts, attention and embedding against the dense model, byte for byte. mergekit stores a layer's experts as one tensor."""

    def stored(folder: Path, name: str, part: Any = ...) -> bytes:
        with safe_open(folder / places[folder][name], "pt") as f:
            return f.get_slice(name)[part].contiguous().view(torch.uint8).numpy().tobytes()

    places = {f: json.loads((f / "model.safetensors.index.json").read_text())["weight_map"] for f in (base, result)}
    inner, checked = LLAMA["intermediate_size"], 0
    for layer in (0, 11, 21):
        at = f"model.layers.{layer}"
        for e in (0, EXPERTS - 1):
            for dense, own, fused, rows in (
                ("gate_proj", "w1", "gate_up_proj", slice(0, inner)),
                ("up_proj", "w3", "gate_up_proj", slice(inner, None)),
                ("down_proj", "w2", "down_proj", slice(None)),
            ):
                one, all_ = f"{at}.block_sparse_moe.experts.{e}.{own}.weight", f"{at}.mlp.experts.{fused}"
                found = stored(result, one) if one in places[result] else stored(result, all_, (e, rows))
                assert found == stored(base, f"{at}.mlp.{dense}.weight"), (result, layer, e, dense)
                checked += 1
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.11.self_attn.k_proj.weight", "model.norm.weight"):
        assert stored(result, name) == stored(base, name), (result, name)
        checked += 1
    return checked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="folder for 12 GB of temporary files (default: the system's)")
    parser.add_argument("--mergekit-venv", type=Path, help="environment with mergekit, made where there is none (default: in --work)")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="upcycle_stream-", dir=args.work))
    try:
        compare(work, args.mergekit_venv or work / "mergekit", args.repetitions)
    finally:
        shutil.rmtree(work)


def compare(work: Path, venv: Path, repetitions: int) -> None:
    base, result = work / "base", work / "result"
    make_base(base)
    shards = [f.stat().st_size for f in base.glob("*.safetensors")]
    layers, width, inner = (LLAMA[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    size = sum(shards) + 2 * layers * ((EXPERTS - 1) * 3 * width * inner + EXPERTS * width)
    plans: dict[str, list[Any]] = {
        "ours": [sys.executable, "-c", OURS, base, result],
        "ours, nothing written": [sys.executable, "-c", OURS, base],
        "plain copy": [sys.executable, "-c", COPY, base, result, str(size)],
    }
    unavailable = install_mergekit(venv)
    if not unavailable:
        expert = {"source_model": str(base), "positive_prompts": ["unused by random gates"]}
        recipe = {
            "base_model": str(base),
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts_per_token": TOP_K,
            "experts": [expert] * EXPERTS,
        }
        (work / "mergekit.yml").write_text(json.dumps(recipe))
        tool = [venv / "bin" / "mergekit-moe", work / "mergekit.yml", result, "--i-understand-this-is-not-useful-without-training"]
        plans["mergekit-moe"] = tool
        plans["mergekit-moe, shards of 500 MB"] = [*tool, "--out-shard-size", "500M"]
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in plans}
    arms, checked = list(plans), 0
    for round_ in range(repetitions + 1):
        for arm in arms[round_ % len(arms) :] + arms[: round_ % len(arms)]:
            seen = measure(work, base, plans[arm])
            seen["bytes"] = sum(f.stat().st_size for f in result.glob("*.safetensors"))
            if round_:
                runs[arm].append(seen)
            elif (result / "config.json").exists():
                checked = spot_check(base, result)
            shutil.rmtree(result, ignore_errors=True)
    report(runs, max(shards), sum(shards), checked, unavailable, venv)


def report(runs: dict[str, list[dict[str, Any]]], shard: int, size: int, checked: int, unavailable: str, venv: Path) -> None:
    def ratio(arm: str, to: str, what: str) -> list[float]:
        return [a[what] / b[what] for a, b in zip(runs[arm], runs[to], strict=True)]

    def of(arm: str, what: str, unit: float = 1) -> str:
        return spread([r[what] / unit for r in runs[arm]])

    rows = [
        [
            arm,
            of(arm, "wall"),
            of(arm, "synced"),
            of(arm, "cpu"),
            of(arm, "peak", 1e9),
            spread(ratio(arm, "plain copy", "wall")),
            of(arm, "from_disk", 1e9),
            f"{seen[0]['bytes'] / 1e9:.2f}",
        ]
        for arm, seen in runs.items()
    ]
    against = ""
    if unavailable:
        rows.append(["mergekit-moe", f"could not be installed: {unavailable}", *[""] * 6])
    else:
        times, sizes = (statistics.median(ratio("mergekit-moe", "ours", what)) for what in ("wall", "peak"))
        against = f" mergekit-moe takes {times:.2f} times our time and {sizes:.1f} times our memory."
    allowed = 2 * shard + 700_000_000
    peak, slower = max(r["peak"] for r in runs["ours"]), statistics.median(ratio("ours", "plain copy", "wall"))
    steps = zip(*(json.loads(r["printed"]) for r in runs["ours"]), strict=True)
    imports, planning, writing = (spread(list(seconds)) for seconds in steps)
    speeds = [r["bytes"] / r["wall"] / 1e9 for r in runs["plain copy"]]
    free, load = ([r[what] for seen in runs.values() for r in seen] for what in ("free", "load"))
    in_round = list(zip(runs["ours"], runs["ours, nothing written"], runs["plain copy"], strict=True))
    own = {what: [(ours[what] - start[what]) / copy[what] for ours, start, copy in in_round] for what in ("wall", "cpu")}
    notes = [
        f"Base: {size / 1e6:.0f} MB in shards of at most {shard / 1e6:.0f} MB; the memory goal is counted in the largest.",
        "Before each run all memory is filled with page cache, of the files it reads last, and pending writes are synced. "
        f"At most {max(free) / 1e6:.0f} MB were free then, the load average of {os.cpu_count()} cores was {spread(load)}, and the "
        f"copy ran at {spread(speeds)} GB/s. "
        "One round of all arms goes unmeasured. One thread (OMP_NUM_THREADS=1).",
        "wall: start to end of the process, interpreter and imports included; synced: until the disk has it all. Peak is "
        "ru_maxrss, which counts pages of memory-mapped files too. Cells are median (min to max); ratios are taken within a round.",
        f"Inside ours, seconds: imports {imports}, opening and planning {planning}, writing {writing}.",
        f"Without what the process costs before the first tensor moves (second row), ours takes {spread(own['wall'])} times the "
        f"copy's wall time and {spread(own['cpu'])} times its CPU time.",
        f"{checked} tensors of ours{'' if unavailable else ' and of mergekit'} equal the dense model's byte for byte "
        "(experts, attention, embedding, head).",
    ]
    if not unavailable:
        notes.append(f"mergekit in its own environment: {mergekit_versions(venv)}.")
    save(
        "upcycle_stream",
        claim="Upcycling a 1.1B Llama to 4 experts peaks at no more than twice the base's largest shard + 700 MB "
        "and takes no more than 1.3 times a plain copy of the result",
        outcome=f"Memory {'met' if peak <= allowed else 'missed'}: at most {peak / 1e6:.0f} MB of {allowed / 1e6:.0f} MB. "
        f"Time {'met' if slower <= 1.3 else 'missed'}: {slower:.2f} times the copy, {statistics.median(own['wall']):.2f} without "
        f"start-up.{against}",
        columns=["arm", "wall s", "synced s", "CPU s", "peak RSS GB", "wall / copy", "GB read from disk", "GB written"],
        rows=rows,
        seeds=[0],
        notes=notes,
    )


if __name__ == "__main__":
    main()
