"""Dynamic batch loading against a constant mix, at equal steps: how far is the worst domain from its reference loss in the end?

The model is stories260K, the domains are those of the Sheared LLaMA samples. References are the held-out losses of the same model after
three times as many steps on the constant mix.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import SHARED, Cache, save
from modelwright.core.data.make import tokenize
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.tune.dynamic_batch import Domains, DynamicBatch, Knobs

SEEDS, KINDS = [0, 1, 2], ("wiki", "arxiv", "stackexchange", "book", "c4")
CONTEXT, BATCH, STEPS, EVERY, ROWS, HELD = 64, 8, 50, 5, 400, 24


def texts(source: Checkpoint) -> Domains:
    """The same number of rows of each domain; the last ones are held out."""
    parts = {}
    for kind in KINDS:
        text = ""
        for file in sorted((SHARED / "sheared_redpajama_sample").glob(f"sample_{kind}*.jsonl")):
            text += "\n".join(json.loads(line)["text"][:40_000] for line in file.read_text(encoding="utf-8").splitlines())
        ids = source.tokenizer()(text[:150_000], add_special_tokens=False)["input_ids"][: (ROWS + HELD) * CONTEXT]
        parts[kind] = tokenize([ids], None, 512, CONTEXT)
    each = {k: p.split(ROWS) for k, p in parts.items()}
    return Domains({k: a for k, (a, _) in each.items()}, {k: b for k, (_, b) in each.items()})


def once(source: Checkpoint, rows: Domains, steps: int, seed: int, **knobs: Any) -> dict[str, dict[str, float]]:
    """Losses and mix at the end."""
    technique = DynamicBatch(Knobs(**knobs))
    technique.weights = dict.fromkeys(KINDS, 1 / len(KINDS))
    technique.first, technique.taken = dict(technique.weights), dict.fromkeys(KINDS, 0)
    train = Train(tokens=steps * BATCH * CONTEXT, lr=1e-3, batch=BATCH, context=CONTEXT, eval_every=10**6, save_every=10**6, record=False)
    with tempfile.TemporaryDirectory() as folder:
        fit(source.model(torch.float32), rows, train, techniques=[technique], evals={}, folder=Path(folder), seed=seed)
    return {"losses": technique.losses, "weights": technique.weights}


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    source, cache = Checkpoint(SHARED / "stories260K" / "hf"), Cache("dynamic_batch")
    rows = texts(source)
    long = 3 * STEPS
    references = cache(["reference", long], lambda: once(source, rows, long, 99, every=10**6)["losses"])
    arms: dict[str, dict[str, Any]] = {
        "constant": {"every": 10**6},
        "dynamic, clipped (paper)": {"every": EVERY},
        "dynamic, not clipped (code)": {"every": EVERY, "clip": False},
    }
    table, worst = [], {}
    for arm, knobs in arms.items():
        each = [cache([arm, s, STEPS], lambda k=knobs, s=s: once(source, rows, STEPS, s, references=references, **k)) for s in SEEDS]
        gaps = [max(e["losses"][k] - references[k] for k in KINDS) for e in each]
        worst[arm] = gaps
        mean = [statistics.mean(e["losses"].values()) for e in each]
        mix = ", ".join(f"{k} {each[0]['weights'][k]:.2f}" for k in KINDS)
        table.append([arm, f"{statistics.mean(gaps):.4f} ({min(gaps):.4f} to {max(gaps):.4f})", f"{statistics.mean(mean):.4f}", mix])
    means = {arm: statistics.mean(g) for arm, g in worst.items()}
    save(
        "dynamic_batch",
        claim="Dynamic batch loading makes the largest distance of a domain from its reference loss smaller than a constant mix does",
        outcome="Largest distance, in nats per token: " + "; ".join(f"{arm} {v:.4f}" for arm, v in means.items()) + ".",
        columns=["mix", "largest distance from a reference", "mean loss of the domains", "mix at the end, seed 0"],
        rows=table,
        seeds=SEEDS,
        notes=[
            f"{STEPS} steps of {BATCH * CONTEXT} tokens at 1e-3; the mix is changed every {EVERY} steps, from equal shares",
            "references: " + ", ".join(f"{k} {references[k]:.4f}" for k in KINDS),
        ],
    )


if __name__ == "__main__":
    main()
