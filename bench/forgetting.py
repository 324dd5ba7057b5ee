"""What does each way to tune forget of the old task while it learns the new one, and would a lower learning rate do as well?

stories260K (simple stories) learns tiny Shakespeare. Old loss: on samples of the untouched model. Every method is swept over the same
learning rates; its end point is compared with what full tuning at another rate reaches at the same new loss. Controls: random rows for
MIGU, full tuning's own sweep for all.
"""

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import torch

from common import SHARED, Cache, save
from modelwright import registry
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit

ARMS = {
    "full": ("full", {}),
    "HFT": ("hft", {}),
    "MIGU, guard grad": ("migu", {"guard": "grad"}),
    "MIGU, guard update": ("migu", {"guard": "update"}),
    "random rows, guard grad": ("migu", {"guard": "grad", "rows": "random"}),
    "random rows, guard update": ("migu", {"guard": "update", "rows": "random"}),
    "keys only": ("key_value", {"part": "keys"}),
    "values only": ("key_value", {"part": "values"}),
    "LoRA r=8, all matrices": ("lora", {"roles": ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]}),
}
CONTEXT = 128


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--tokens", type=int, default=100_000)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    args.add_argument("--between", type=float, nargs="+", default=[1e-5, 3e-5, 1.7e-4, 6e-4, 1.7e-3], help="further rates of full tuning")
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    source, cache = Checkpoint(SHARED / "stories260K" / "hf"), Cache("forgetting")
    new = tokenize(read(Data(path=str(SHARED / "tinyshakespeare" / "input.txt"))), source.tokenizer(), 512, CONTEXT)
    train, held_out = new.split(len(new) - 64)
    evals = {"new": held_out, "old": samples(source)}

    def once(arm: str, lr: float, seed: int) -> dict:
        name, settings = ARMS[arm]
        knobs = Train(tokens=a.tokens, lr=lr, batch=8, context=CONTEXT, eval_every=20, save_every=10**6, record=False)
        with tempfile.TemporaryDirectory() as folder:
            made = registry.techniques_named(name, settings)
            o = fit(source.model(), train, knobs, techniques=made, evals=evals, folder=Path(folder), seed=seed)
        path = [[n["loss"], old["loss"]] for n, old in zip(o.evals[::2], o.evals[1::2], strict=True)]
        return {"path": path, "leak": o.facts.get("migu", {}).get("leak")}

    def of(arm: str, lr: float, seed: int) -> dict:
        return cache([arm, lr, seed, a.tokens], lambda: once(arm, lr, seed))

    sweep = sorted({*a.lrs, *a.between})
    runs = {(arm, lr, s): of(arm, lr, s) for s in range(a.seeds) for arm in ARMS for lr in (sweep if arm == "full" else a.lrs)}
    rows, verdicts = [], {}
    for arm in ARMS:
        for lr in sweep if arm == "full" else a.lrs:
            ends = [runs[arm, lr, s]["path"][-1] for s in range(a.seeds)]
            gaps = [end[1] - frontier([runs["full", x, s]["path"][-1] for x in sweep], end[0]) for s, end in enumerate(ends)]
            verdicts[arm, lr] = gaps
            leak = [runs[arm, lr, s]["leak"] for s in range(a.seeds)]
            rows.append(
                [arm, f"{lr:g}", *(f"{statistics.mean(e[i] for e in ends):.3f}" for i in (0, 1)), show(gaps)]
                + [f"{statistics.mean(leak):.0%}" if None not in leak else ""]
            )
    start = runs["full", a.lrs[0], 0]["path"][0]
    save(
        "forgetting",
        claim="At the same new-task loss HFT, MIGU, keys only and LoRA forget less than full tuning at a lower learning rate "
        "(2404.18466, 2406.17245, 2402.12233)",
        outcome=outcome(verdicts, a.lrs),
        columns=["method", "lr", "new loss", "old loss", "old loss above full tuning's at that new loss", "leak"],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=[
            f"nats per token; before training new {start[0]:.3f}, old {start[1]:.3f}; {a.tokens:,} tokens, AdamW without weight decay",
            "full tuning's frontier runs through the end points of its own sweep of nine rates, seed by seed; it is convex, so that the "
            "straight lines between them flatter the other methods a little",
            "± is the standard deviation over seeds; a method beats a lower learning rate where the gap is negative by more than it",
        ],
        plots=pictures(runs, a),
    )


def samples(source: Checkpoint) -> Rows:
    """Old task: 64 rows that the untouched model writes, at temperature 1."""
    torch.manual_seed(7)
    start = torch.full((64, 1), source.tokenizer().bos_token_id)
    ids = source.model().generate(start, do_sample=True, top_k=0, max_new_tokens=CONTEXT - 1, min_new_tokens=CONTEXT - 1)
    return Rows(ids.int(), ids.int(), torch.full((64,), CONTEXT))


def frontier(ends: list[list[float]], new: float) -> float:
    """Full tuning's old loss at this new loss: between the end points of its sweep; beyond them the nearest one's."""
    for (n0, o0), (n1, o1) in itertools.pairwise(sorted(ends)):
        if n0 <= new <= n1:
            return o0 + (o1 - o0) * (new - n0) / (n1 - n0)
    return min(ends, key=lambda e: abs(e[0] - new))[1]


def show(gaps: list[float]) -> str:
    return f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps):.3f}"


def outcome(verdicts: dict, lrs: list[float]) -> str:
    better, worse, same = [], [], []
    for arm in ARMS:
        if arm == "full":
            continue
        gaps = [verdicts[arm, lr] for lr in lrs]
        wins = [lr for lr, g in zip(lrs, gaps, strict=True) if statistics.mean(g) < -statistics.stdev(g)]
        losses = [lr for lr, g in zip(lrs, gaps, strict=True) if statistics.mean(g) > statistics.stdev(g)]
        words = f"{arm} ({len(wins)} of {len(lrs)} rates below the frontier, {len(losses)} above)"
        (better if len(wins) > len(losses) else worse if len(losses) > len(wins) else same).append(words)
    parts = [
        f"{what}: {'; '.join(found)}"
        for what, found in (("Forget less than a lower learning rate", better), ("More", worse), ("The same", same))
        if found
    ]
    return ". ".join(parts) + "."


def pictures(runs: dict, a: argparse.Namespace) -> list[dict]:
    def ends(arm: str) -> list[list[float]]:
        lrs = sorted({lr for name, lr, _ in runs if name == arm})
        return sorted([statistics.mean(runs[arm, lr, s]["path"][-1][i] for s in range(a.seeds)) for i in (0, 1)] for lr in lrs)

    groups = [("Halves and loud rows", ["full", "HFT", "MIGU, guard grad", "MIGU, guard update", "random rows, guard update"])]
    groups.append(("Parts and adapters", ["full", "keys only", "values only", "LoRA r=8, all matrices"]))
    return [
        {
            "kind": "line",
            "title": f"{title}: old against new loss",
            "x": "new loss (lower left is better)",
            "y": "old loss",
            "series": {n: ends(n) for n in arms},
        }
        for title, arms in groups
    ]


if __name__ == "__main__":
    main()
