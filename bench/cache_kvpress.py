"""Head to head with kvpress: the same random Llama and prompt, the same tokens kept? And time and peak memory side by side.

Its newest release wants a transformers older than ours, so it runs in an environment of its own, which this script makes once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import save, spread

PRESSES = ("none", "SnapKV", "TOVA", "StreamingLLM", "key norm")
CHILD = """
import json, resource, sys, time, torch
from contextlib import nullcontext
from transformers import DynamicCache, LlamaForCausalLM
library, folder, length, keep, rounds, names = sys.argv[1:]
length, keep, rounds, names = int(length), float(keep), int(rounds), names.split(",")
torch.set_num_threads(1)
model = LlamaForCausalLM.from_pretrained(folder).eval()
ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
if library == "kvpress":
    import kvpress as k
    made = {"SnapKV": k.SnapKVPress(1 - keep, window_size=64, kernel_size=5), "TOVA": k.TOVAPress(1 - keep),
            "StreamingLLM": k.StreamingLLMPress(1 - keep, n_sink=4), "key norm": k.KnormPress(1 - keep)}
    block = {n: (lambda n=n: made[n](model)) if n != "none" else nullcontext for n in names}
else:
    from modelwright.cache.evictors.baselines import TOVA, KeyNorm, SnapKV, StreamingLLM
    from modelwright.cache.engine.evict import evict
    made = {"SnapKV": SnapKV(keep=keep, observe=64, kernel=5, pooling="mean"), "TOVA": TOVA(keep=keep),
            "StreamingLLM": StreamingLLM(keep=keep, sinks=4), "key norm": KeyNorm(keep=keep)}
    block = {n: (lambda n=n: evict(model, made[n])) if n != "none" else nullcontext for n in names}
seconds, kept, full = {n: [] for n in names}, {}, None
with torch.inference_mode():
    for _ in range(rounds):
        for n in names:
            cache = DynamicCache(config=model.config)
            with block[n]():
                began = time.process_time()
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                seconds[n].append(time.process_time() - began)
            keys = [x.keys for x in cache.layers]
            if "none" not in names:
                continue
            full = keys if n == "none" else full
            kept[n] = [[[int(i) for i in (f[:, :2][None] == p[:, :2][:, None]).all(-1).float().argmax(1).sort().values]
                        for f, p in zip(a[0], b[0])] for a, b in zip(full, keys)] if n != "none" else []
print(json.dumps({"seconds": seconds, "kept": kept, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def environment(folder: Path) -> Path:
    """The Python of an environment that holds kvpress."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True, clear=True)
        torch_pin = f"torch=={torch.__version__.split('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "-q", torch_pin, "transformers<5.3", "kvpress"], check=True)
        (folder / "made").touch()
    return python


def child(python: Path, *argv: object) -> dict:
    where = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([python, "-c", CHILD, *map(str, argv)], capture_output=True, text=True, env=where)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "modelwright-kvpress")
    args.add_argument("--length", type=int, default=2048)
    args.add_argument("--rounds", type=int, default=5)
    a = args.parse_args()
    theirs = environment(a.environment)
    found, peak, rows, agree = {}, {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
        config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16_384)
        LlamaForCausalLM(config).save_pretrained(folder)
        for library, python in (("kvpress", theirs), ("ours", Path(sys.executable))):
            for keep in (0.5, 0.25):
                found[library, keep] = child(python, library, folder, a.length, keep, a.rounds, ",".join(PRESSES))
            for press in PRESSES[:2]:
                peak[library, press] = child(python, library, folder, 4 * a.length, 0.25, 1, press)["peak"]
    version = subprocess.run(
        [theirs, "-c", "from importlib.metadata import version as v; print(v('kvpress'), v('transformers'))"],
        capture_output=True,
        text=True,
    ).stdout.split()
    for keep in (0.5, 0.25):
        for press in PRESSES[1:]:
            x, y = (found[name, keep] for name in ("kvpress", "ours"))
            pairs = [(set(p), set(q)) for a_, b in zip(x["kept"][press], y["kept"][press], strict=True) for p, q in zip(a_, b, strict=True)]
            agree[press, keep] = sum(len(p & q) for p, q in pairs) / sum(len(p) for p, _ in pairs)
            ratio = [[s / t for s, t in zip(z["seconds"][press], z["seconds"]["none"], strict=True)] for z in (x, y)]
            seconds = [f"{statistics.median(z['seconds'][press]):.3f}" for z in (x, y)]
            size = {len(p) for pair in pairs for p in pair}
            rows.append(
                [
                    press,
                    f"{keep:.0%}",
                    size.pop() if len(size) == 1 else sorted(size),
                    f"{agree[press, keep]:.3%}",
                    *map(spread, ratio),
                    *seconds,
                ]
            )
    more = {lib: (peak[lib, "SnapKV"] - peak[lib, "none"]) / 2**20 for lib in ("kvpress", "ours")}
    save(
        "cache_kvpress",
        claim="SnapKV, key norm, StreamingLLM and TOVA keep the tokens that kvpress keeps, in no more time and memory",
        outcome=f"{min(agree.values()):.2%} to {max(agree.values()):.2%} of the kept tokens agree; peak memory beside the full cache's at "
        f"{4 * a.length:,} tokens and 25 % kept by SnapKV: {more['ours']:+.0f} MB ours, {more['kvpress']:+.0f} MB kvpress.",
        columns=["method", "kept", "tokens", "kept alike", "prefill beside stock: kvpress", "ours", "seconds: kvpress", "seconds: ours"],
        rows=rows,
        notes=[
            f"kvpress {version[0]} on transformers {version[1]}, ours on the one below; a random Llama of 6 layers of width 512, 8 "
            f"heads of which 4 hold keys, {a.length:,} tokens, fp32, one thread, CPU seconds, {a.rounds} rounds",
            "SnapKV with kvpress's window of 64 and mean pooling over 5",
        ],
    )


if __name__ == "__main__":
    main()
