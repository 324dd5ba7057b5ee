"""Five real tasks one after another: what is left at the end, and is MIGU's choice of rows better than chance?

A tiny Llama with its own tokenizer is trained on the mixed texts of the tasks, 600 answered examples of each, then learns agnews, sst-2,
amazon, qqp and mnli in this order from 400 others; labels are words, scored by likelihood within the task's own label set. Full tuning's
learning rate is swept and the other methods run at its best one (adapters at five times it). Control: as many random rows as MIGU moves.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import modelwright
from common import SHARED, Cache, save
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import silence_transformers

TASKS = ["agnews", "sst-2", "amazon", "qqp", "mnli"]
ARMS = {
    "full": ("full", {}),
    "MIGU, guard grad": ("migu", {}),
    "MIGU, guard update": ("migu", {"guard": "update"}),
    "random rows, guard update": ("migu", {"guard": "update", "rows": "random"}),
    "HFT": ("hft", {}),
    "LoRA r=8": ("lora", {"roles": ["attn.q", "attn.v", "ffn.gate", "ffn.up", "ffn.down"]}),
}
CONTEXT = 96


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--pretrain", type=int, default=2_000_000, help="tokens")
    args.add_argument("--examples", type=int, default=400, help="per task")
    args.add_argument("--test", type=int, default=100, help="per task")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("continual")
    home = cache.file.with_suffix("")
    base = pretrained(home, a)
    files = [subset(home, name, a.examples) for name in TASKS]

    def once(arm: str, lr: float, seed: int) -> dict:
        name, settings = ARMS[arm]
        if arm.startswith("LoRA"):
            lr = 5 * lr  # adapters take larger rates
        train = Train(epochs=3, lr=lr, batch=16, context=CONTEXT, record=False, save_every=10**6)
        found = modelwright.run(
            "judge.continual", base=base, seed=seed, tasks=files, tune=name, settings=settings, train=train, limit=a.test, untrained=False
        )
        return next(iter(found.steps[0]["metrics"].values()))

    def of(arm: str, lr: float, s: int) -> dict:
        return cache([arm, lr, s], lambda: once(arm, lr, s))

    runs = {("full", lr, s): of("full", lr, s) for s in range(a.seeds) for lr in a.lrs}
    chosen = max(a.lrs, key=lambda lr: sum(runs["full", lr, s]["AA"] for s in range(a.seeds)))
    runs |= {(arm, chosen, s): of(arm, chosen, s) for s in range(a.seeds) for arm in ARMS}
    rows, means = [], {}
    for arm in ARMS:
        for lr in a.lrs if arm == "full" else [chosen]:
            found = [runs[arm, lr, s] for s in range(a.seeds)]
            means[arm, lr] = {k: [m[k] for m in found] for k in ("AA", "BWT", "LA")}
            rows.append([arm, f"{lr * (5 if arm.startswith('LoRA') else 1):g}", *(spread(means[arm, lr][k]) for k in ("AA", "BWT", "LA"))])
    best = dict.fromkeys(ARMS, chosen)
    save(
        "continual",
        claim="Over a sequence of tasks MIGU and HFT end with a higher average accuracy than full tuning at its best learning rate, "
        "and MIGU higher than random rows (2406.17245, 2404.18466)",
        outcome=outcome(means, best),
        columns=["method", "lr", "AA", "BWT", "learning accuracy"],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=[
            f"percent, mean ± standard deviation over seeds; {a.examples} examples per task, 3 passes; {a.test} test examples per task; "
            f"chance is 25, 50, 20, 50, 33 (mean 36)",
            f"model: 4 blocks, width 128, trained on {a.pretrain:,} tokens of the tasks' texts; MIGU leaves the first task unmasked; "
            "adapters are merged after each task",
            f"update overlap of the paper is not measured; order {', '.join(TASKS)}",
        ],
        plots=[
            {
                "kind": "bars",
                "title": "At full tuning's best rate",
                "y": "accuracy, %",
                "groups": list(ARMS),
                "series": {k: [statistics.mean(means[arm, best[arm]][k]) for arm in ARMS] for k in ("AA", "LA")},
            }
        ],
    )


def pretrained(home: Path, a: argparse.Namespace) -> Path:
    home.mkdir(exist_ok=True)
    if not (home / "base").exists():
        tasks = {name: json.loads((SHARED / "cl15" / f"{name}.json").read_text())["train"] for name in TASKS}
        with open(home / "mixed.jsonl", "w") as file:
            for i in range(1000 - a.examples):
                for rows in tasks.values():
                    file.write(json.dumps({"text": f"{rows[i]['sentence'].strip()[:280]}\nAnswer: {rows[i]['label']}"}) + "\n")
        fresh = modelwright.run("reshape.fresh", to=home / "fresh", data=str(home / "mixed.jsonl"), vocab=1024, context=256)
        train = {"tokens": a.pretrain, "lr": 3e-3, "batch": 16, "context": 128, "schedule": "cosine", "record": False}
        modelwright.run("tune.full", base=fresh.to, to=home / "base", data=str(home / "mixed.jsonl"), train=train)
    return home / "base"


def subset(home: Path, name: str, n: int) -> str:
    raw = json.loads((SHARED / "cl15" / f"{name}.json").read_text())
    (home / f"{name}.json").write_text(json.dumps(raw | {"train": raw["train"][-n:]}))
    return str(home / f"{name}.json")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def outcome(means: dict, best: dict) -> str:
    def of(arm: str, k: str = "AA") -> list[float]:
        return means[arm, best[arm]][k]

    words = [
        f"{arm} {statistics.mean(of(arm)):.1f} (BWT {statistics.mean(of(arm, 'BWT')):+.1f}, LA {statistics.mean(of(arm, 'LA')):.1f})"
        for arm in ARMS
    ]
    migu, chance = of("MIGU, guard update"), of("random rows, guard update")
    gap = [x - y for x, y in zip(migu, chance, strict=True)]
    clear = abs(statistics.mean(gap)) > 2 * statistics.stdev(gap)
    verdict = "more than" if clear else "within"
    return f"AA at full tuning's best rate: {', '.join(words)}. MIGU (update) minus random rows: {spread(gap)}, {verdict} twice the spread."


if __name__ == "__main__":
    main()
