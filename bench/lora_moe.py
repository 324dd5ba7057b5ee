"""Does LoRAMoE forget less than LoRA of equal size, and do its groups of experts part by the type of a sample?

The seedling learns 1,365 short typed samples (closed-book questions are type 1, everything else 0); old text is library documentation
it was not trained on. Arms: LoRAMoE with its constraint, with the printed sign of it, without it, and LoRA of the same number of
parameters on the same matrices. Every arm is swept over six learning rates on the first seed, LoRA over half of each, since no gate
divides its update, and two more. The end points of LoRA's sweep on every seed are its trade of new against old loss; a LoRAMoE arm is
compared with it at the arm's own new loss, on all seeds at rates within 0.05 nats of the arm's best.

    python bench/lora_moe.py [--lrs 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

import forgetting
from common import SHARED, Cache, save
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows, collate
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.core.train.trainer import forward
from modelwright.curate.stdlib import Knobs as Stdlib
from modelwright.curate.stdlib import stdlib
from modelwright.moe.lora import mass
from modelwright.tune import lora, lora_moe

CONTEXT, ROLES = 160, ["ffn.gate", "ffn.up", "ffn.down"]
LORA = "LoRA r=25"
ARMS = {
    "LoRAMoE": {"beta": 0.1},
    "LoRAMoE, sign as printed": {"beta": 0.1, "convention": "paper"},
    "LoRAMoE, no constraint": {"beta": 0.0},
    LORA: None,
}


def made(arm: str) -> lora_moe.LoraMoe | lora.Lora:
    if (knobs := ARMS[arm]) is None:
        return lora.Lora(lora.Knobs(r=25, alpha=200, dropout=0.05, roles=ROLES))
    return lora_moe.LoraMoe(lora_moe.Knobs(types="task_type", **knobs))


@torch.no_grad()
def first_half(technique: lora_moe.LoraMoe, model: torch.nn.Module, rows: Rows, types: torch.Tensor) -> list[float]:
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
    args.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], help="LoRA gets half of each")
    args.add_argument("--between", type=float, nargs="+", default=[1.4e-3, 2.8e-3], help="further rates of LoRA, where its trade bends")
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    source, cache = Checkpoint("seedling"), Cache("lora-moe")
    reader = lora_moe.LoraMoe(lora_moe.Knobs(types="task_type"))
    data = Data(path=str(SHARED / "loramoe_tiny" / "train.json"))
    rows = reader.rows(data, source.tokenizer(), 2048, Train(context=CONTEXT), 0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows, types = Rows(rows.ids[order], rows.labels[order], rows.lengths[order]), reader.types[order]
    train, test = rows.split(len(rows) - 200)
    with tempfile.TemporaryDirectory() as tmp:
        stdlib(Stdlib(parts=["docstrings"], share="heldout", characters=60_000), Path(tmp))
        documents = read(Data(path=str(Path(tmp) / "dataset.jsonl"), column="text"))
    old = tokenize(documents, source.tokenizer(), 2048, CONTEXT).split(96)[0]

    def once(arm: str, lr: float, seed: int) -> dict:
        technique = made(arm)
        if arm != LORA:
            technique.types = types
        knobs = Train(epochs=1, lr=lr, batch=16, context=CONTEXT, schedule="cosine", eval_every=10**6, save_every=10**6, record=False)
        with tempfile.TemporaryDirectory() as folder:
            evals = {"new": test, "old": old}
            o = fit(source.model(), train, knobs, techniques=[technique], evals=evals, folder=Path(folder), seed=seed)
        found = {n: o.at(n)["loss"] for n in evals} | {"start": {n: o.at(n, last=False)["loss"] for n in evals}}
        found["trained"] = sum(p.numel() for p in o.model.parameters() if p.requires_grad)
        found["use"] = first_half(technique, o.model, test, types[-200:]) if arm != LORA else None
        return found

    def of(arm: str, lr: float, s: int) -> dict:
        return cache([arm, lr, s], lambda: once(arm, lr, s))

    lrs = dict.fromkeys(ARMS, a.lrs) | {LORA: sorted([*(lr / 2 for lr in a.lrs), *a.between])}
    best = {arm: min(lrs[arm], key=lambda lr, arm=arm: of(arm, lr, 0)["new"]) for arm in ARMS}  # swept on the first seed
    trade = [[point(of(LORA, lr, s)) for lr in lrs[LORA]] for s in range(a.seeds)]
    rows_, gaps, plots = [], {}, {}
    for arm in ARMS:
        for lr in lrs[arm]:
            near = of(arm, lr, 0)["new"] < of(arm, best[arm], 0)["new"] + 0.05
            seeds = range(a.seeds) if arm == LORA or near else range(1)
            found = [of(arm, lr, s) for s in seeds]
            pairs = [(trade[s], f) for s, f in zip(seeds, found, strict=True)]
            gap = [f["old"] - frontier(t, f["new"]) for t, f in pairs if reached(t, f["new"])]
            gaps[arm, lr] = gap
            plots.setdefault(arm, []).append(point(found[0]))
            use = [f"{statistics.mean(r['use'][t] for r in found):.3f}" if found[0]["use"] else "" for t in (0, 1)]
            row = [arm, f"{lr:g}{', best' if lr == best[arm] else ''}", len(seeds), f"{found[0]['trained']:,}"]
            row += [show([f[k] for f in found]) for k in ("new", "old")]
            rows_.append([*row, "" if arm == LORA else compared(gap, len(seeds)), *use])
    start = of("LoRAMoE", best["LoRAMoE"], 0)["start"]
    save(
        "lora_moe",
        claim="LoRAMoE forgets less than LoRA of equal size, and its constraint parts the experts by the type of a sample (2312.09979)",
        outcome=outcome(best, gaps, rows_, a.seeds) + f" Before: new {start['new']:.3f}, old {start['old']:.3f}.",
        columns=["arm", "lr", "seeds", "trained", "new loss", "old loss", "old loss above LoRA's at that new loss"]
        + ["first half's mass, type 0", "type 1"],
        rows=rows_,
        seeds=list(range(a.seeds)),
        notes=[
            "nats per token, mean ± standard deviation over seeds; one pass of 1,365 samples cut at 160 tokens, 200 held out; best: the "
            "lowest new loss on seed 0",
            "LoRA's trade runs in straight lines through those end points of its sweep that no other beats in both losses, seed by seed; "
            "where it is convex the lines lie above it and flatter LoRAMoE; at its low end it is steep and the comparison uncertain",
        ],
        plots=[
            {
                "kind": "line",
                "title": "Old against new loss over the learning rates, seed 0",
                "x": "new loss (lower left is better)",
                "y": "old loss",
                "series": {arm: sorted(points) for arm, points in plots.items()},
            }
        ],
    )


def point(found: dict) -> list[float]:
    return [found["new"], found["old"]]


def best_of(ends: list[list[float]]) -> list[list[float]]:
    """Without the end points that another one beats in both losses: rates that are too high for either."""
    return [e for e in ends if not any(o[0] < e[0] and o[1] < e[1] for o in ends)]


def reached(ends: list[list[float]], new: float) -> bool:
    return min(e[0] for e in ends) <= new <= max(e[0] for e in best_of(ends))


def frontier(ends: list[list[float]], new: float) -> float:
    return forgetting.frontier(best_of(ends), new)


def show(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def compared(gap: list[float], seeds: int) -> str:
    beyond = f", outside LoRA's range on {seeds - len(gap)}" if len(gap) < seeds else ""
    return show(gap, "+") + beyond if gap else "outside LoRA's range"


def outcome(best: dict, gaps: dict, rows: list[list], seeds: int) -> str:
    """Each arm against LoRA's trade at every rate that was run on all seeds, and whether the gates' halves part by type."""
    parts = []
    for arm in best:
        whole = {lr: g for (name, lr), g in gaps.items() if name == arm != LORA and len(g) > 1}
        words = [f"at {lr:g}{' (its best)' if lr == best[arm] else ''} {compared(g, seeds)}: {side(g)}" for lr, g in whole.items()]
        parts += [f"{arm} {'; '.join(words)}"] if words else []
    mass = {r[0]: float(r[-1]) - float(r[-2]) for r in rows if "best" in r[1] and r[-1]}
    sides = ", ".join(f"{arm} {m:+.3f}" for arm, m in mass.items())
    return f"Old loss beside LoRA's at the same new loss: {'. '.join(parts)}. Mass of type 1 minus type 0 at the best rate: {sides}."


def side(gaps: list[float]) -> str:
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
    return "less forgotten" if mean < -spread else "more" if mean > spread else "the same"


if __name__ == "__main__":
    main()
