"""Masks learnt little by little against masks made once, at equal steps, on a model that has converged.

The model is stories260K. Its text is drawn from the model itself, so it has converged on it: more training cannot help, and every loss that
pruning costs shows. All arms train all weights for the same steps; the share of neurons that a token uses is the same in the end.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import SHARED, Cache, save
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.tune.masks import Knobs, Masks

SEEDS, TARGETS = [0, 1, 2], (0.5, 0.25, 0.1)
ROWS, HELD, WIDTH, BATCH = 384, 64, 64, 8
LEARNT = {"mask_lr": 0.3, "multiplier_lr": 3.0, "ramp": 0.4, "hard": 0.2}
ARMS: dict[str, dict[str, Any]] = {
    "learnt, 4 masks, 2 a token": {"experts": 4, "top_k": 2, **LEARNT},
    "magnitude, once": {"experts": 1, "top_k": 1, "how": "magnitude"},
    "random, once": {"experts": 1, "top_k": 1, "how": "random"},
}


def drawn(model: Any, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and held-out rows, sampled from the model."""
    torch.manual_seed(seed)
    n = ROWS + HELD
    ids = model.generate(torch.ones(n, 1, dtype=torch.long), do_sample=True, top_k=0, max_length=WIDTH, min_length=WIDTH, pad_token_id=0)
    ids = ids.int()
    rows = [Rows(part, part.clone(), torch.full((len(part),), WIDTH)) for part in (ids[:ROWS], ids[ROWS:])]
    return rows[0], rows[1]


def once(arm: dict[str, Any] | None, target: float, seed: int, data: tuple[Rows, Rows]) -> dict[str, float]:
    """Held-out losses before and after, and the share of active neurons."""
    source = Checkpoint(SHARED / "stories260K" / "hf")
    technique = Technique() if arm is None else Masks(Knobs(target=target, **arm))
    train = Train(lr=1e-3, batch=BATCH, context=WIDTH, eval_every=10**6, save_every=10**6, record=False, divergence=0)
    with tempfile.TemporaryDirectory() as folder:
        out = fit(
            source.model(torch.float32), data[0], train, techniques=[technique], evals={"held": data[1]}, folder=Path(folder), seed=seed
        )
    facts = out.facts.get("masks", {"reached": {"active": 1.0}, "memory": 1.0})
    return {"loss": out.at("held")["loss"], "active": facts["reached"]["active"], "memory": facts["memory"]}


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    cache, rows, found = Cache("masks"), [], {}
    data: dict[int, tuple[Rows, Rows]] = {}
    for seed in SEEDS:
        data[seed] = drawn(Checkpoint(SHARED / "stories260K" / "hf").model(torch.float32).eval(), seed)
    for target in (1.0, *TARGETS):
        for name, arm in {"dense": None}.items() if target == 1.0 else ARMS.items():
            each = [cache([name, target, s, ROWS], lambda a=arm, t=target, s=s: once(a, t, s, data[s])) for s in SEEDS]
            losses = found[target, name] = [e["loss"] for e in each]
            rows.append(
                [
                    f"{1 - target:.0%}",
                    name,
                    f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
                    f"{statistics.mean(e['active'] for e in each):.3f}",
                    f"{statistics.mean(e['memory'] for e in each):.2f}",
                ]
            )
    said = []
    for target in TARGETS:
        mean = {name: statistics.mean(found[target, name]) for name in ARMS}
        order = " < ".join(f"{name} {v:.3f}" for name, v in sorted(mean.items(), key=lambda kv: kv[1]))
        said.append(f"{1 - target:.0%} sparse: {order}")
    dense = statistics.mean(found[1.0, "dense"])
    save(
        "masks",
        claim="Masks that are learnt little by little keep more than masks made once by magnitude or by chance, at equal steps and "
        "an equal share of active neurons, on a model that has converged",
        outcome=f"Dense {dense:.3f} nats per token. {'. '.join(said)}.",
        columns=[
            "sparsity",
            "arm",
            "held-out nats per token",
            "share of neurons that a token uses",
            "neurons kept in the file, of the source's",
        ],
        rows=rows,
        seeds=SEEDS,
        notes=[
            f"{ROWS // BATCH} steps of {BATCH * WIDTH} tokens at 1e-3 for every arm; masks {LEARNT}",
            "the text is sampled from stories260K at temperature 1, so the dense loss is its entropy",
        ],
    )


if __name__ == "__main__":
    main()
