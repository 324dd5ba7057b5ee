"""How memory grows: a 350M-shaped bf16 Llama loaded, stepped and saved by 1, 2 and 4 processes; a corpus of two sizes made into rows.

python bench/scale.py                # all
python bench/scale.py worker ...     # one of several processes; started by torchrun
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SHARED, save

CONFIG = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 32000, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
MB = 1e6


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


# ---- a model over several processes ------------------------------------------------------------------------------------
def make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).save_pretrained(folder)


def worker(base: str, to: str, processes: int, stage: str) -> None:
    """Load, and save or train; the first process prints the highest peak of all, less what the imports take."""
    import torch

    from modelwright.core.data.rows import Rows
    from modelwright.core.knobs import Train
    from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
    from modelwright.core.train import dist
    from modelwright.core.train.loop import fit
    from modelwright.runner.recipe import Save
    from modelwright.runner.tune import _loaded, _write_sharded
    from modelwright.tune.full import Full, Knobs

    torch.set_num_threads(1)
    silence_transformers()
    dist.start(processes)
    source, technique = Checkpoint(base), Full(Knobs())
    _ = source.skeleton
    if processes > 1:
        dist.barrier()
    before, began = peak(), time.perf_counter()
    train = Train(strategy="fsdp2", epochs=1, batch=1, context=16, eval_every=10**6, save_every=10**6, lr=1e-4, record=False)
    kind = torch.bfloat16 if stage == "load and save" else torch.float32
    model = _loaded(source, kind, [technique], train)
    loaded, seconds = peak(), time.perf_counter() - began
    if stage == "train":
        ids = torch.arange(4 * 16, dtype=torch.int32).view(4, 16) + 5
        model = fit(model, Rows(ids, ids, torch.full((4,), 16)), train, techniques=[technique], evals={}, folder=Path(to), seed=0).model
    elif processes > 1:
        part = Path(to) / "part"
        part.mkdir(parents=True, exist_ok=True)
        rows: Any = type("Rows", (), {"stops": [], "facts": {}})
        _write_sharded(model, {"facts": {}, "notes": []}, [technique], source, None, rows, part, Save())
    else:
        model.save_pretrained(Path(to) / "part")
    peaks = torch.tensor([loaded - before, peak() - before, seconds], dtype=torch.float64)
    if processes > 1:
        torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    if dist.rank() == 0:
        print("RESULT " + json.dumps(peaks.tolist()), flush=True)
    if processes > 1:
        dist.end()


def measured(base: Path, folder: Path, processes: int, stage: str) -> list[float]:
    to = folder / f"{processes}-{stage.split()[0]}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, __file__, "worker", str(base), str(to), str(processes), stage],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(found[0][7:])


def models(folder: Path) -> list[list[Any]]:
    base = folder / "base"
    subprocess.run([sys.executable, __file__, "model", str(base)], check=True)
    values = (base / "model.safetensors").stat().st_size / 2
    d, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    block = d * d * 2.5 + 3 * d * f
    rows, alone = [], 0.0
    for processes in (1, 2, 4):
        load, whole, seconds = measured(base, folder, processes, "load and save")
        alone = alone or seconds
        bound = (values / processes + 2 * block) * 2 / MB
        rows.append([f"load and save, {processes}", f"{load:.0f}", f"{whole:.0f}", f"{bound:.0f}", f"{seconds / alone:.2f}"])
    for processes in (1, 2, 4):
        load, whole, seconds = measured(base, folder, processes, "train")
        bound = (values / processes * 4 + 2 * block) * 4 / MB
        rows.append([f"four steps in fp32, {processes}", f"{load:.0f}", f"{whole:.0f}", f"{bound:.0f}", ""])
    return rows


# ---- a corpus -----------------------------------------------------------------------------------------------------------
def corpus(file: str, cache: str) -> None:
    """Rows of a text file, twice: memory above what the imports take, and tokens a second beside the tokenizer's own batches."""
    os.environ["MODELWRIGHT_CACHE"] = cache
    from modelwright.core.data.encode import _parallel_tokenizers
    from modelwright.core.data.make import make_rows
    from modelwright.core.knobs import Data
    from modelwright.core.model.checkpoint import SEEDLING, Checkpoint

    tokenizer = Checkpoint(SEEDLING).tokenizer()
    tokenizer("warm")
    before, began = peak(), time.perf_counter()
    rows = make_rows(Data(path=file), tokenizer, len(tokenizer), 512)
    first, memory = time.perf_counter() - began, peak() - before
    began = time.perf_counter()
    make_rows(Data(path=file), tokenizer, len(tokenizer), 512)
    again = time.perf_counter() - began
    text = Path(file).read_text()[: 1 << 23]
    lines = [text[i : i + (1 << 20)] for i in range(0, len(text), 1 << 20)]
    backend, began = tokenizer.backend_tokenizer, time.perf_counter()
    with _parallel_tokenizers():
        found = sum(len(e.ids) for e in backend.encode_batch_fast(lines, add_special_tokens=False))
    own = found / (time.perf_counter() - began)
    print("RESULT " + json.dumps([memory, rows.tokens / first, own, again]))


def corpora(folder: Path) -> list[list[Any]]:
    words = (SHARED / "tinyshakespeare" / "input.txt").read_text() if (SHARED / "tinyshakespeare" / "input.txt").exists() else ""
    words = words or next((SHARED / "tinyshakespeare").glob("*.txt")).read_text()
    lines, found = words.splitlines(keepends=True), []
    for size in (50, 100):
        file, rng = folder / f"{size}.txt", random.Random(0)  # noqa: S311
        with file.open("w") as f:
            while f.tell() < size * MB:
                f.write("".join(rng.choices(lines, k=2000)))
        done = subprocess.run([sys.executable, __file__, "corpus", str(file), str(folder / "cache")], capture_output=True, text=True)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(done.stderr[-3000:])
        memory, speed, own, again = json.loads(line[7:])
        found.append(
            [f"{size} MB of text", "", f"{memory:.0f}", "1000", f"{speed / own:.2f} of the tokenizer's own; again in {again:.1f} s"]
        )
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        rows = [*models(Path(tmp)), *corpora(Path(tmp))]
    within = [float(r[2]) <= float(r[3]) for r in rows]
    save(
        "scale",
        claim="A process takes its shard and two blocks at load and at save; rows of a corpus take at most 1 GB, whatever its size",
        outcome=f"{sum(within)} of {len(within)} rows are within their bound; load and save by 2 and 4 processes: "
        f"{rows[1][2]} and {rows[2][2]} MB of {rows[1][3]} and {rows[2][3]} MB allowed.",
        columns=["what", "peak after load, MB", "peak, MB", "bound, MB", "load time of one process, or speed"],
        rows=rows,
        notes=[
            "peak resident memory of the largest process, less what it had after its imports; a Llama of width 1024, 24 blocks, 32,000 "
            "words, tied, stored in bf16; the bound of training counts weights, gradients and two moments in fp32; gloo on one machine"
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    elif sys.argv[1:2] == ["model"]:
        make_model(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["corpus"]:
        corpus(sys.argv[2], sys.argv[3])
    else:
        main()
