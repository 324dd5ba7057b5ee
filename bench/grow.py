"""Does a grown model beat one trained from scratch at equal FLOPs, and which operator grows best?

A byte-level Llama learns five kinds of text (the Sheared-LLaMA samples, context 64). Depth: 2 blocks are trained, grown to 8 and trained
on. Width: 48 units in 4 blocks are trained and grown to 96. The control has the grown shape from the start and the same total FLOPs, the
small model's training counted; its learning rate is swept on one seed, and so is that of stack, whose best all operators use.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modelwright
from common import SHARED, Cache, save, spread
from modelwright.core.data.make import tokenize
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.tune.full import Full
from modelwright.tune.full import Knobs as FullKnobs

CONTEXT, BATCH, BASE_LR = 64, 16, 1e-3
SHAPES = {  # kind: small shape, growth, arms
    "depth": ({"layers": 2, "hidden": 96}, {"depth": 4}, ["stack", "interpolate", "zero", "net2net"]),
    "width": ({"layers": 4, "hidden": 48}, {"depth": 1, "hidden": 96}, ["net2net", "interpolate", "zero"]),
}
STEPS = {"depth": (150, 240), "width": (75, 120)}  # of the small model, of the grown one
GROWN = {"depth": {"layers": 8, "hidden": 96}, "width": {"layers": 4, "hidden": 96}}


def model_of(layers: int, hidden: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 24,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def texts() -> tuple[Rows, Rows]:
    """Rows of bytes to train on, and held-out rows: the last twentieth of each kind of text."""
    train, held = [], []
    for kind in ("wiki", "arxiv", "stackexchange", "book", "c4"):
        text = b""
        for file in sorted((SHARED / "sheared_redpajama_sample").glob(f"sample_{kind}*.jsonl")):
            text += b"\n".join(json.loads(line)["text"].encode()[:20_000] for line in file.read_text(encoding="utf-8").splitlines())
        text = text[:1_000_000]
        train.append(list(text[: len(text) * 19 // 20]))
        held.append(list(text[-32 * CONTEXT :]))
    return tokenize(train, None, 256, CONTEXT), tokenize(held, None, 256, CONTEXT)


def flops(shape: dict[str, int]) -> int:
    """Of one token, forward and backward."""
    return 3 * Anatomy(model_of(**shape, seed=0)).flops_per_token(CONTEXT)


def trained(model: Any, tokens: int, lr: float, seed: int, data: tuple[Rows, Rows], to: Path | None = None) -> list[list[float]]:
    """Held-out loss along the way: [tokens, nats per byte]."""
    steps = max(1, tokens // (BATCH * CONTEXT))
    knobs = Train(
        tokens=tokens, lr=lr, schedule="cosine", warmup=min(1.0, 30 / steps), batch=BATCH, context=CONTEXT, weight_decay=0.1,
        eval_every=max(1, steps // 10), save_every=10**6, record=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        o = fit(model, data[0], knobs, techniques=[Full(FullKnobs())], evals={"held": data[1]}, folder=Path(folder), seed=seed)
    if to:
        o.model.save_pretrained(to)
    return [[e["step"] * BATCH * CONTEXT, e["loss"]] for e in o.evals]


class Bench:
    def __init__(self, tmp: Path):
        self.tmp, self.data, self.cache = tmp, texts(), Cache("grow")

    def base(self, kind: str, seed: int) -> Path:
        """The trained small model."""
        to = self.tmp / f"{kind}-{seed}"
        if not to.exists():
            trained(model_of(**SHAPES[kind][0], seed=seed), STEPS[kind][0] * BATCH * CONTEXT, BASE_LR, seed, self.data, to)
        return to

    def once(self, kind: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
        """The held-out loss against FLOPs, those of the small model counted."""
        small, growth, _ = SHAPES[kind]
        per_token, before = flops(GROWN[kind]), flops(small) * STEPS[kind][0] * BATCH * CONTEXT
        tokens = STEPS[kind][1] * BATCH * CONTEXT
        if arm == "scratch":
            tokens, before = tokens + before // per_token, 0
            model = model_of(**GROWN[kind], seed=100 + seed)
        else:
            with tempfile.TemporaryDirectory() as folder:
                result = modelwright.run(
                    "reshape.grow", base=self.base(kind, seed), to=Path(folder) / "out", seed=seed, operator=arm, **growth
                )
                model = Checkpoint(result.to).model()
        path = trained(model, tokens, lr, seed + 1000, self.data)
        return {"path": [[before + t * per_token, loss] for t, loss in path]}

    def __call__(self, kind: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
        return self.cache([kind, arm, lr, seed, *STEPS[kind]], lambda: self.once(kind, arm, lr, seed))


def reached(path: list[list[float]], loss: float) -> float | None:
    """FLOPs at which a run first has this held-out loss, between two evaluations by a straight line."""
    for (x0, y0), (x1, y1) in zip(path, path[1:], strict=False):
        if y1 <= loss < y0:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--kinds", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    with tempfile.TemporaryDirectory() as tmp:
        rows, outcomes, plots, notes = [], [], [], []
        of = Bench(Path(tmp))
        sweep = {arm: {lr: of("depth", arm, lr, 0)["path"][-1][1] for lr in a.lrs} for arm in ("scratch", "stack")}
        best = {arm: min(by, key=by.__getitem__) for arm, by in sweep.items()}
        for kind in a.kinds:
            report(of, kind, best, a.seeds, rows, outcomes, plots)
        rates = [f"{arm} " + ", ".join(f"{lr:g} {v:.4f}" for lr, v in by.items()) for arm, by in sweep.items()]
        notes.append("learning rates on seed 0, in depth: " + "; ".join(rates) + "; width takes the same")
        if edge := [arm for arm, lr in best.items() if lr == max(a.lrs)]:
            notes.append(f"the best rate of {' and '.join(edge)} is the highest that was tried, so a higher one may be better still")
        notes += [f"{kind} was left out of this run" for kind in SHAPES if kind not in a.kinds]
    save(
        "grow",
        claim="A grown model beats one from scratch at equal FLOPs, the small model's training counted, with every operator, in "
        "depth and in width; stack is the best operator in depth (2405.15319)",
        outcome=" ".join(outcomes),
        columns=[
            "growth",
            "arm",
            "lr",
            "held-out nats per byte at equal FLOPs",
            "right after growing",
            "speed-up to the control's loss, %",
        ],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=notes,
        plots=plots,
    )


def report(of: Bench, kind: str, best: dict[str, float], seeds: int, rows: list, outcomes: list, plots: list) -> None:
    """Runs one kind of growth and adds its rows, sentence and plot."""
    operators, ends, series = SHAPES[kind][2], {}, {}
    for arm in ("scratch", *operators):
        lr = best["scratch" if arm == "scratch" else "stack"]
        paths = [of(kind, arm, lr, s)["path"] for s in range(seeds)]
        controls = [of(kind, "scratch", best["scratch"], s)["path"] for s in range(seeds)]
        ends[arm] = [p[-1][1] for p in paths]
        gains = [c[-1][0] / x - 1 if (x := reached(p, c[-1][1])) else None for p, c in zip(paths, controls, strict=True)]
        known = [100 * g for g in gains if g is not None]
        gain = "" if arm == "scratch" else spread(known) if len(known) == seeds else f"not reached on {seeds - len(known)} of {seeds}"
        start = "" if arm == "scratch" else spread([p[0][1] for p in paths])
        rows.append([kind, arm, lr, f"{statistics.mean(ends[arm]):.4f} ({min(ends[arm]):.4f} to {max(ends[arm]):.4f})", start, gain])
        series[arm] = [[x, y] for x, y in paths[0] if y < 3.5]
    won = [o for o in operators if all(x < y for x, y in zip(ends[o], ends["scratch"], strict=True))]
    lost = [o for o in operators if o not in won]
    order = " < ".join(sorted(ends, key=lambda arm: statistics.mean(ends[arm])))
    verdict = f"below the control on every seed: {', '.join(won) or 'none'}; not: {', '.join(lost) or 'none'}"
    outcomes.append(f"{kind.capitalize()}: {verdict}. Mean loss: {order}.")
    if kind == "depth" and (near := [o for o in operators if o != "stack" and min(ends[o]) < max(ends["stack"])]):
        outcomes.append(f"Stack is not shown to be the best operator: the seeds of {', '.join(near)} overlap with its own.")
    plots.append({"kind": "line", "title": f"Growth in {kind}, seed 0", "x": "FLOPs", "y": "held-out nats per byte", "series": series})


if __name__ == "__main__":
    main()
