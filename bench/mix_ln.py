"""Do deep blocks learn with Mix-LN, and is the loss better? Gradient profile, depth map and loss of four placements of the norms.

At the start: 12 blocks of 256 units, gradient norm of each block. Training: a byte-level model of 12 blocks of 64 units on five kinds of
text, equal clipping for all (the paper's scripts clip pre and not mix), the learning rate swept on one seed for each placement.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import Cache, save
from grow import BATCH, CONTEXT, texts
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.numbers.stats import spearman
from modelwright.core.train.loop import fit
from modelwright.inspect.depth import angles, gradient_norms, mean_loss, skipped, states_of
from modelwright.models.mix_ln import MixLNConfig, MixLNForCausalLM, placements
from modelwright.tune.full import Full
from modelwright.tune.full import Knobs as FullKnobs

NORMS = ("pre", "post", "mix", "output")
LAYERS = 12


def model_of(norm: str, hidden: int, seed: int) -> MixLNForCausalLM:
    torch.manual_seed(seed)
    return MixLNForCausalLM(
        MixLNConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=hidden // 32,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
            norm_placement=placements(LAYERS, norm, 0.25),
        )
    )


def profile(model: Any, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Gradients, angular distances and losses without each block."""
    model.eval()
    blocks = [b.module for b in Anatomy(model).blocks]
    loss, states = states_of(model, blocks, batches)
    steps = angles(states)[:, 0].tolist()
    rises = []
    for block in blocks:
        with skipped(block):
            rises.append(mean_loss(model, batches) - loss)
    return {"loss": loss, "gradients": gradient_norms(model, blocks, batches), "steps": steps, "rises": rises}


def start(norm: str, seed: int) -> list[float]:
    """Gradient norms before training, 256 units."""
    model = model_of(norm, 256, seed)
    ids = torch.randint(0, 256, (8, CONTEXT), generator=torch.Generator().manual_seed(seed))
    return gradient_norms(model, [b.module for b in Anatomy(model).blocks], [ids])


def trained(norm: str, lr: float, seed: int, steps: int, data: Any) -> dict[str, Any]:
    """Held-out loss after training, and the depth profile there."""
    knobs = Train(
        tokens=steps * BATCH * CONTEXT, lr=lr, schedule="cosine", warmup=0.1, batch=BATCH, context=CONTEXT, clip=1.0,
        eval_every=10**6, save_every=10**6, record=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        o = fit(
            model_of(norm, 64, seed),
            data[0],
            knobs,
            techniques=[Full(FullKnobs())],
            evals={"held": data[1]},
            folder=Path(folder),
            seed=seed,
        )
    return {"held": o.at("held")["loss"], **profile(o.model, [data[1].ids[:32].long()])}


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--steps", type=int, default=120)
    args.add_argument("--start", action="store_true", help="measure untrained models only")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("mix_ln")
    before_training(cache, a.seeds)
    if not a.start:
        after_training(cache, a)


def before_training(cache: Cache, seeds: int) -> None:
    """Gradient norms of untrained models of 256 units."""
    begins = {n: [cache(["start", n, s], lambda n=n, s=s: start(n, s)) for s in range(seeds)] for n in NORMS}
    spread = {n: [max(g) / min(g) for g in by] for n, by in begins.items()}
    even = all(m < p for m, p in zip(spread["mix"], spread["pre"], strict=True))
    save(
        "mix_ln_start",
        claim="Before training the gradients of the blocks are more even with Mix-LN than with Pre-LN (2412.13795)",
        outcome=f"{'Met on every seed' if even else 'Not met on every seed'}: largest over smallest block "
        + ", ".join(f"{n} {statistics.mean(v):.2f}" for n, v in spread.items())
        + ".",
        columns=["norms", "gradient, largest / smallest block", "first block", "last block"],
        rows=[
            [n, f"{statistics.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})"]
            + [f"{statistics.mean(g[i] for g in begins[n]):.3f}" for i in (0, -1)]
            for n, v in spread.items()
        ],
        seeds=list(range(seeds)),
        notes=["12 blocks of 256 units, random tokens; mix has 3 post blocks"],
        plots=[plot("at the start", {n: begins[n][0] for n in NORMS})],
    )


def after_training(cache: Cache, a: argparse.Namespace) -> None:
    """Loss, gradients and depth after a short training of models of 64 units."""
    data = texts()

    def of(norm: str, lr: float, seed: int) -> dict[str, Any]:
        return cache([norm, lr, seed, a.steps], lambda: trained(norm, lr, seed, a.steps, data))

    best = {n: min(a.lrs, key=lambda lr, n=n: of(n, lr, 0)["held"]) for n in NORMS}
    runs = {n: [of(n, best[n], s) for s in range(a.seeds)] for n in NORMS}
    save(
        "mix_ln",
        claim="After training Mix-LN has more even gradients than Pre-LN, its deep blocks do more, and its loss is lower (2412.13795)",
        outcome=verdict(runs),
        columns=[
            "norms",
            "lr",
            "gradient, largest / smallest block",
            "held-out nats per byte",
            "rise without a deep block",
            "correlation of angle and depth",
        ],
        rows=[line(n, best[n], runs[n]) for n in NORMS],
        seeds=list(range(a.seeds)),
        notes=[
            f"means over the seeds; {a.steps} steps, 64 units, 12 blocks, clip 1 for all; mix has 3 post blocks",
            "a deep block is one of the last three; its rise is the loss of the model that passes it over less that of the whole",
            "learning rates on seed 0: "
            + "; ".join(f"{n} " + ", ".join(f"{lr:g} {of(n, lr, 0)['held']:.4f}" for lr in a.lrs) for n in NORMS),
        ],
        plots=[plot("after training", {n: runs[n][0]["gradients"] for n in NORMS})],
    )


def plot(when: str, by: dict[str, list[float]]) -> dict[str, Any]:
    series = {n: [[i, g / max(values)] for i, g in enumerate(values)] for n, values in by.items()}
    return {
        "kind": "line",
        "title": f"Gradient norm of each block {when}, seed 0",
        "x": "block",
        "y": "times the largest",
        "series": series,
    }


def spreads(profiles: list[list[float]]) -> float:
    return statistics.mean(max(g) / min(g) for g in profiles)


def deep(run: dict[str, Any]) -> float:
    return statistics.mean(run["rises"][-3:])


def turning(run: dict[str, Any]) -> float:
    return spearman(torch.tensor(run["steps"]).numpy(), torch.arange(LAYERS).numpy())


def line(norm: str, lr: float, runs: list[dict[str, Any]]) -> list[Any]:
    held = [r["held"] for r in runs]
    return [
        norm,
        lr,
        f"{spreads([r['gradients'] for r in runs]):.2f}",
        f"{statistics.mean(held):.4f} ({min(held):.4f} to {max(held):.4f})",
        f"{statistics.mean(map(deep, runs)):.4f}",
        f"{statistics.mean(map(turning, runs)):+.2f}",
    ]


def verdict(runs: dict[str, Any]) -> str:
    """What was seen, by claim."""

    def every(of: Any) -> str:
        wins = [of(m) < of(p) for m, p in zip(runs["mix"], runs["pre"], strict=True)]
        return "yes on every seed" if all(wins) else f"on {sum(wins)} of {len(wins)} seeds"

    def spread(run: dict[str, Any]) -> float:
        return max(run["gradients"]) / min(run["gradients"])

    return (
        f"Mix against pre: more even gradients: {every(spread)}; more is lost without a deep block: {every(lambda r: -deep(r))}; "
        f"lower loss: {every(lambda r: r['held'])}. The paper's gains in loss come from runs hundreds of times as long."
    )


if __name__ == "__main__":
    main()
