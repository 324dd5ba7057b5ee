"""Does LoRAMoE forget less than LoRA of equal size, and do its groups of experts part by the type of a sample?

The seedling learns 1,365 short typed samples (closed-book questions are type 1, everything else 0); old text is library documentation
it was not trained on. Arms: LoRAMoE with its constraint, with the printed sign of it, without it, and LoRA of the same number of
parameters on the same matrices; each arm's learning rate is the best of two on the first seed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from common import SHARED, Cache, save
from modelwright import drivers
from modelwright.core import text
from modelwright.core.checkpoint import Checkpoint
from modelwright.core.knobs import Data, Train
from modelwright.core.text import collate
from modelwright.core.trainer import forward
from modelwright.core.training import fit
from modelwright.curate.stdlib import Knobs as Stdlib
from modelwright.curate.stdlib import stdlib
from modelwright.moe.lora import mass
from modelwright.tune import lora, lora_moe

CONTEXT, ROLES = 160, ["ffn.gate", "ffn.up", "ffn.down"]
ARMS = {
    "LoRAMoE": {"beta": 0.1},
    "LoRAMoE, sign as printed": {"beta": 0.1, "convention": "paper"},
    "LoRAMoE, no constraint": {"beta": 0.0},
    "LoRA r=25": None,
}


def made(arm: str) -> lora_moe.LoraMoe | lora.Lora:
    if (knobs := ARMS[arm]) is None:
        return lora.Lora(lora.Knobs(r=25, alpha=200, dropout=0.05, roles=ROLES))
    return lora_moe.LoraMoe(lora_moe.Knobs(types="task_type", **knobs))


@torch.no_grad()
def first_half(technique: lora_moe.LoraMoe, model: torch.nn.Module, rows: text.Rows, types: torch.Tensor) -> list[float]:
    """Share of the gates' mass on the first half of the experts, for samples of type 0 and 1, mean over layers."""
    model.train()  # gates are heard while training only; the seedling has no dropout but the adapters'
    sums, counts = torch.zeros(2), torch.zeros(2)
    for i in range(0, len(rows), 16):
        batch = collate([rows[j] for j in range(i, min(i + 16, len(rows)))])
        sink: list[torch.Tensor] = []
        for layer in technique.layers:
            layer.sink, layer.dropout = sink, 0.0
        forward(model, batch)
        share = torch.stack([(m := mass(w, batch["real"]))[:, : m.shape[1] // 2].sum(1) / m.sum(1) for w in sink]).mean(0)
        sums.index_add_(0, types[i : i + 16], share)
        counts += types[i : i + 16].bincount(minlength=2)
    return (sums / counts).tolist()


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 4e-3])
    a = args.parse_args()
    torch.set_num_threads(1)
    drivers.calm()
    source, cache = Checkpoint("seedling"), Cache("lora-moe")
    reader = lora_moe.LoraMoe(lora_moe.Knobs(types="task_type"))
    data = Data(path=str(SHARED / "loramoe_tiny" / "train.json"))
    rows = reader.rows(data, source.tokenizer(), 2048, Train(context=CONTEXT), 0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows, types = text.Rows(rows.ids[order], rows.labels[order], rows.lengths[order]), reader.types[order]
    train, test = rows.split(len(rows) - 200)
    with tempfile.TemporaryDirectory() as tmp:
        stdlib(Stdlib(parts=["docstrings"], share="heldout", characters=60_000), Path(tmp))
        documents = text.read(Data(path=str(Path(tmp) / "dataset.jsonl"), column="text"))
    old = text.tokenize(documents, source.tokenizer(), 2048, CONTEXT).split(96)[0]

    def once(arm: str, lr: float, seed: int) -> dict:
        technique = made(arm)
        if arm != "LoRA r=25":
            technique.types = types
        knobs = Train(epochs=1, lr=lr, batch=16, context=CONTEXT, schedule="cosine", eval_every=10**6, save_every=10**6, record=False)
        with tempfile.TemporaryDirectory() as folder:
            evals = {"new": test, "old": old}
            o = fit(source.model(), train, knobs, techniques=[technique], evals=evals, folder=Path(folder), seed=seed)
        found = {n: o.at(n)["loss"] for n in evals} | {"start": {n: o.at(n, last=False)["loss"] for n in evals}}
        found["trained"] = sum(p.numel() for p in o.model.parameters() if p.requires_grad)
        found["use"] = first_half(technique, o.model, test, types[-200:]) if arm != "LoRA r=25" else None
        return found

    def of(arm: str, lr: float, s: int) -> dict:
        return cache([arm, lr, s], lambda: once(arm, lr, s))

    best = {arm: min(a.lrs, key=lambda lr, arm=arm: of(arm, lr, 0)["new"]) for arm in ARMS}  # swept on the first seed
    rows_, mean = [], {}
    for arm, lr in best.items():
        found = [of(arm, lr, s) for s in range(a.seeds)]
        mean[arm] = {k: statistics.mean(r[k] for r in found) for k in ("new", "old")}
        use = [f"{statistics.mean(r['use'][t] for r in found):.3f}" if found[0]["use"] else "" for t in (0, 1)]
        spread = [f"{mean[arm][k]:.3f} ± {statistics.stdev(r[k] for r in found):.3f}" for k in ("new", "old")]
        rows_.append([arm, f"{lr:g}", f"{found[0]['trained']:,}", *spread, *use])
    start = of("LoRAMoE", best["LoRAMoE"], 0)["start"]
    words = "; ".join(f"{arm} new {m['new']:.3f}, old {m['old']:.3f}" for arm, m in mean.items())
    save(
        "lora_moe",
        claim="LoRAMoE forgets less than LoRA of equal size, and its constraint parts the experts by the type of a sample (2312.09979)",
        outcome=f"At each arm's best rate for the new samples: {words}; before: new {start['new']:.3f}, old {start['old']:.3f}.",
        columns=["arm", "lr", "trained", "new loss", "old loss", "first half's mass, type 0", "type 1"],
        rows=rows_,
        seeds=list(range(a.seeds)),
        notes=[
            "the sweep, seed 0 (new, old): "
            + "; ".join(f"{arm} at {lr:g} {of(arm, lr, 0)['new']:.3f}, {of(arm, lr, 0)['old']:.3f}" for arm in ARMS for lr in a.lrs),
            "two rates do not draw LoRA's whole trade of new against old: between them it may come near LoRAMoE",
            "nats per token, mean ± standard deviation over seeds; one pass of 1,365 samples cut at 160 tokens, 200 held out",
        ],
    )


if __name__ == "__main__":
    main()
