"""A model cut to half its parameters: gates that are learnt against units that are chosen once, at equal tokens.

The model is stories260K. Its text is drawn from the model itself, so it has converged on it. Each arm prunes for some steps and trains what
is left for some more; the arms that choose once train what is left in both halves, behind the same export.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import SHARED, Cache, save
from masks import BATCH, ROWS, WIDTH, drawn
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.tune.shear import Knobs, Shear

SEEDS = [0, 1, 2]
SHAPE = {"layers": 4, "heads": 4, "ffn": 88}  # of 5 blocks, 8 query heads on 4 keys, 172 neurons; the stream stays 64 wide
ARMS = ("learnt", "magnitude", "activation", "random", "uniform")


def trained(model: Any, technique: Technique, data: tuple[Rows, Rows], lr: float, seed: int) -> tuple[Any, list[float]]:
    """The model, and its held-out losses at the start and the end."""
    train = Train(lr=lr, batch=BATCH, context=WIDTH, eval_every=10**6, save_every=10**6, record=False, divergence=0)
    with tempfile.TemporaryDirectory() as folder:
        out = fit(model, data[0], train, techniques=[technique], evals={"held": data[1]}, folder=Path(folder), seed=seed)
    return out.model, [e["loss"] for e in out.evals]


def once(how: str, seed: int, data: tuple[Rows, Rows]) -> dict[str, float]:
    """Losses after pruning and after recovery, and the share of the parameters that is left."""
    source = Checkpoint(SHARED / "stories260K" / "hf").model(torch.float32)
    before = sum(p.numel() for p in source.parameters())
    technique = Shear(Knobs(how=how, mask_lr=0.5, multiplier_lr=5.0, **SHAPE))
    model, pruned = trained(source, technique, data, 1e-3, seed)
    small = technique.export(model, Path("."))
    share = sum(p.numel() for p in small.parameters()) / before
    _, after = trained(small, Technique(), data, 1e-3, seed + 100)
    return {"pruned": pruned[-1], "exported": after[0], "loss": after[-1], "share": share}


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    cache, rows, means = Cache("shear"), [], {}
    data = {s: drawn(Checkpoint(SHARED / "stories260K" / "hf").model(torch.float32).eval(), s) for s in SEEDS}
    stories = Checkpoint(SHARED / "stories260K" / "hf")
    dense = [cache(["dense", s, ROWS], lambda s=s: trained(stories.model(torch.float32), Technique(), data[s], 1e-3, s)[1]) for s in SEEDS]
    for how in ARMS:
        each = [cache([how, s, ROWS, SHAPE], lambda how=how, s=s: once(how, s, data[s])) for s in SEEDS]
        ends = [e["loss"] for e in each]
        means[how] = statistics.mean(ends)
        rows.append(
            [
                how,
                f"{statistics.mean(e['share'] for e in each):.2f}",
                f"{statistics.mean(e['exported'] for e in each):.3f}",
                f"{means[how]:.3f} ({min(ends):.3f} to {max(ends):.3f})",
            ]
        )
    order = " < ".join(f"{how} {v:.3f}" for how, v in sorted(means.items(), key=lambda kv: kv[1]))
    steps = ROWS // BATCH
    save(
        "shear",
        claim="Gates that are learnt, then recovery, lose less than units chosen once by magnitude, by activations and block influence, "
        "by lot or evenly spaced, at equal tokens and one shape",
        outcome=f"Held-out nats per token after pruning and recovery: {order}; the source has {statistics.mean(d[0] for d in dense):.3f}.",
        columns=["units are", "parameters left", "nats per token after pruning", "after recovery"],
        rows=rows,
        seeds=SEEDS,
        notes=[
            f"{steps} steps with gates and {steps} without, of {BATCH * WIDTH} tokens, at 1e-3; {SHAPE}",
            "the paper prunes for 3,200 steps of 131,072 tokens: gates have little time here",
        ],
    )


if __name__ == "__main__":
    main()
