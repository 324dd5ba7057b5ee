"""Half and a quarter of the key and value heads: fused by DHA and tuned on, or merged at once and tuned, at equal tokens.

Base: stories260K (8 query heads, 4 key and value heads, 5 layers). Text: the Grimm tales. Arms: DHA; DHA with an even budget; DHA that
fuses neighbours (control for the search); heads that are turned towards each other and averaged (reshape.gqa aligned), or their plain mean,
each followed by tune.full. Control: the whole model tuned on the same tokens. At a quarter each layer has one
head, so there is nothing to search.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import modelwright
from common import SHARED, save
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers

FUSION = 0.6  # share of the tokens in which DHA searches and fuses
OMEGA_LR = 0.2  # a run is some fifty steps, where the paper has thousands; chosen of 0.05 and 0.2 on one seed
BASE = SHARED / "stories260K" / "hf"
ARMS: dict[str, tuple[float, dict[str, Any]]] = {  # budget, knobs of tune.dha or of reshape.gqa
    "whole model, tuned": (1.0, {}),
    "DHA, 50 %": (0.5, {}),
    "DHA, even budget, 50 %": (0.5, {"layers": "uniform"}),
    "DHA, neighbours, 50 %": (0.5, {"grouping": "neighbours"}),
    "aligned, then tuned, 50 %": (0.5, {"method": "aligned"}),
    "mean, then tuned, 50 %": (0.5, {"method": "mean"}),
    "DHA, 25 %": (0.25, {}),
    "aligned, then tuned, 25 %": (0.25, {"method": "aligned"}),
    "mean, then tuned, 25 %": (0.25, {"method": "mean"}),
}


def text(folder: Path) -> tuple[str, str]:
    """The tales in two files: to learn from, and held out."""
    whole = "\n\n".join(f.read_text(encoding="utf-8") for f in sorted((SHARED / "grimm").glob("*.txt")))
    cut = int(len(whole) * 0.95)
    (folder / "learn.txt").write_text(whole[:cut], encoding="utf-8")
    (folder / "held.txt").write_text(whole[cut : cut + 15_000], encoding="utf-8")
    return str(folder / "learn.txt"), str(folder / "held.txt")


def one(arm: str, seed: int, tokens: int, tmp: Path) -> dict[str, float]:
    """Held-out loss right after the heads are fewer and at the end, cache bytes per token."""
    budget, knobs = ARMS[arm]
    learn, held = text(tmp)
    common = {"context": 128, "batch": 8, "eval_every": 10**6, "save_every": 10**6, "record": False}
    given = {"data": learn, "evals": {"held": held}}
    how: dict[str, Any] = {"seed": seed, "save": {"certificate": "structure"}}
    base, left, residual = BASE, tokens, 0.0
    if "method" in knobs:
        base = modelwright.run("reshape.gqa", base=base, to=tmp / "fewer", kv_heads=round(budget * 4), data=learn, **knobs, **how).to
    elif budget < 1:
        part = int(FUSION * tokens)
        search = 0 if budget == 0.25 else part // 1024 // 4
        train = {"tokens": part, "lr": 1e-3, "schedule": "constant", **common}
        own = {"budget": budget, "search": search, "omega_lr": OMEGA_LR, "warm_up": 0.6, **knobs}
        fused = modelwright.run("tune.dha", base=base, to=tmp / "fewer", train=train, **own, **given, **how)
        base, left, residual = fused.to, tokens - part, fused.steps[-1]["facts"]["dha"]["reached"]["fusion"]
    result = modelwright.run("tune.full", base=base, to=tmp / "out", train={"tokens": left, "lr": 1e-3, **common}, **given, **how)
    evals = result.steps[-1]["evals"]
    found = {"start": evals[0]["loss"], "end": evals[-1]["loss"], "residual": residual}
    found["kv"] = result.certificate["kv_bytes_per_token"]
    if seed == 0 and arm in ("whole model, tuned", "DHA, 50 %", "DHA, 25 %"):
        found["speed"] = decoded(result.to)
    return found


@torch.no_grad()
def decoded(folder: Path) -> float:
    """Tokens per second of greedy decoding, 16 rows after a prompt of 400 tokens; the best of three."""
    model, best = Checkpoint(folder).model().eval(), 0.0
    ids = torch.randint(3, 500, (16, 400), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        began = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False)
        best = max(best, 16 * 32 / (time.perf_counter() - began))
    return best


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--tokens", type=int, default=60_000)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    found: dict[str, list[dict[str, float]]] = {}
    for arm in ARMS:
        for seed in range(a.seeds):
            with tempfile.TemporaryDirectory() as tmp:
                found.setdefault(arm, []).append(one(arm, seed, a.tokens, Path(tmp)))
        print(arm, found[arm], flush=True)
    table = []
    for arm, seeds in found.items():
        cells = [f"{statistics.mean(s[k] for s in seeds):.3f} ± {statistics.stdev(s[k] for s in seeds):.3f}" for k in ("start", "end")]
        fastest = found["whole model, tuned"][0]["speed"]
        speed = f"{seeds[0]['speed'] / fastest:.2f}" if "speed" in seeds[0] else ""
        table.append([arm, *cells, int(seeds[0]["kv"]), f"{statistics.mean(s['residual'] for s in seeds):.4f}", speed])

    def below(one: str, other: str) -> str:
        won = sum(x["end"] < y["end"] for x, y in zip(found[one], found[other], strict=True))
        return f"{one} ends below {other} on {won} of {a.seeds} seeds"

    pairs = [("DHA, 50 %", o) for o in list(ARMS)[2:6]] + [("DHA, 25 %", o) for o in list(ARMS)[7:]]
    save(
        "dha",
        claim="fusing heads while training beats merging them at once at equal tokens, aligned or not, and an adaptive budget an even one "
        "(2406.06567)",
        outcome=". ".join(below(*p) for p in pairs) + ".",
        columns=[
            "arm",
            "loss at the start",
            "loss at the end",
            "cache bytes per token",
            "fusion left",
            "decoding, of the whole model's speed",
        ],
        rows=table,
        seeds=list(range(a.seeds)),
        notes=[
            f"{a.tokens:,} tokens in each arm: {FUSION:.0%} of them for the search and fusion of DHA, then tune.full; nats, mean ± sd",
            "with fewer heads: of the first model that has them; DHA has been trained by then, the others have not",
            "the paper fuses with 0.2B tokens and trains on for 5B; decoding on one CPU core, 16 rows after 400 tokens",
        ],
    )


if __name__ == "__main__":
    main()
