"""Does an upcycled mixture beat its dense parent after the same training, and does Drop-Upcycling beat plain copies?

Base: the seedling. New text: library source that it has not seen mixed with the names of Unicode's characters. Arms: dense at the same
tokens, dense at the same FLOPs (controls), sparse, noise, Drop-Upcycling at r = 0.5, its official draws, and r = 1 (every neuron drawn
again with matched statistics: what is left of the parent is attention and statistics, the control for the copies). The learning rate is
swept on one seed for each kind of arm and the best is used for all seeds.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch

import modelwright
from common import save
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit
from modelwright.curate.stdlib import Knobs as Stdlib
from modelwright.curate.stdlib import stdlib
from modelwright.moe.load import divergence, expert_load, max_violation
from modelwright.tune.full import Full
from modelwright.tune.full import Knobs as FullKnobs

UNSEEN = ["asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml"]
ARMS = {
    "dense, same tokens": None,
    "dense, same FLOPs": None,
    "sparse": {"method": "sparse"},
    "noise": {"method": "noise"},
    "drop 0.5": {"method": "drop"},
    "drop 0.5, official": {"method": "drop", "compat": "official"},
    "drop 1 (control)": {"method": "drop", "ratio": 1.0},
}
CONTEXT = 256


def rows_of(folder: Path, tokenizer, share: str, limit: int | None = None) -> dict[str, Rows]:
    found = {}
    for name, knobs in (
        ("source", Stdlib(parts=["source"], only=UNSEEN, share=share)),
        ("unicode", Stdlib(parts=["unicode"], share=share)),
    ):
        stdlib(knobs, folder)
        documents = read(Data(path=str(folder / "dataset.jsonl"), column="text"))
        random.Random(0).shuffle(documents)
        rows = tokenize(documents, tokenizer, len(tokenizer), CONTEXT)
        found[name] = rows.split(limit)[0] if limit and len(rows) > limit else rows
    return found


def join(parts: list[Rows]) -> Rows:
    n = min(len(p) for p in parts)
    cut = [p.split(n)[0] for p in parts]
    return Rows(
        torch.cat([p.ids for p in cut]), torch.cat([p.labels for p in cut]), torch.cat([p.lengths for p in cut]), sum(p.bytes for p in cut)
    )


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--tokens", type=int, default=300_000)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    with tempfile.TemporaryDirectory() as tmp:
        rows, outcome, notes = run(Path(tmp), a)
    save(
        "upcycle_methods",
        claim="An upcycled mixture beats its dense parent after the same training, and Drop-Upcycling beats plain copies "
        "(2212.05055, 2502.19261)",
        outcome=outcome,
        columns=["arm", "lr", "new text, bits per byte", "old text", "active parameters", "domain divergence, bits", "worst MaxVio"],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=notes,
    )


def run(tmp: Path, a: argparse.Namespace) -> tuple[list, str, list[str]]:
    tokenizer = Checkpoint("seedling").tokenizer()
    train = join(list(rows_of(tmp, tokenizer, "train").values()))
    domains = rows_of(tmp, tokenizer, "heldout", 16)
    new = join(list(domains.values()))
    stdlib(Stdlib(skip=UNSEEN, share="heldout"), tmp)
    old = tokenize(read(Data(path=str(tmp / "dataset.jsonl"), column="text")), tokenizer, len(tokenizer), CONTEXT)
    old = Rows(old.ids[::8], old.labels[::8], old.lengths[::8], old.bytes // 8)
    done: dict[str, dict] = {}

    def once(arm: str, seed: int, lr: float) -> dict:
        key = json.dumps([arm, seed, lr])
        if key not in done:
            base, knobs, tokens = "seedling", ARMS[arm], a.tokens
            if knobs:
                base = modelwright.run(
                    "reshape.upcycle", base="seedling", to=tmp / f"m{len(done)}", seed=seed, save={"certificate": "structure"}, **knobs
                ).to
            elif arm == "dense, same FLOPs":
                tokens = int(a.tokens * 4_087_808 / 3_022_848)
            o = fit(
                Checkpoint(base).model(),
                train,
                Train(tokens=tokens, lr=lr, batch=8, context=CONTEXT, eval_every=10**6, save_every=10**6, record=False),
                techniques=[Full(FullKnobs())],
                evals={"new": new, "old": old},
                folder=tmp / f"t{len(done)}",
                seed=seed,
            )
            done[key] = {n: o.at(n)["bits_per_byte"] for n in ("new", "old")}
            if knobs:
                load = torch.stack([expert_load(o.model, d) for d in domains.values()])
                done[key] |= {"divergence": float(divergence(load).mean()), "violation": float(max_violation(load.mean(0)).max())}
            print(key, done[key], flush=True)
        return done[key]

    best = {arm: min(a.lrs, key=lambda lr: once(arm, 0, lr)["new"]) for arm in ("dense, same tokens", "sparse", "drop 0.5")}
    rows, means = [], {}
    for arm, knobs in ARMS.items():
        lr = best["dense, same tokens"] if not knobs else best["drop 0.5"] if knobs["method"] == "drop" else best["sparse"]
        seeds = [once(arm, s, lr) for s in range(a.seeds)]
        means[arm] = [s["new"] for s in seeds]
        extra = [f"{statistics.mean(s[k] for s in seeds):.3f}" if knobs else "" for k in ("divergence", "violation")]
        rows.append(
            [
                arm,
                lr,
                *[f"{statistics.mean(s[k] for s in seeds):.4f} ± {statistics.stdev(s[k] for s in seeds):.4f}" for k in ("new", "old")],
                "988,288" if not knobs else "1,520,768",
                *extra,
            ]
        )
    sweep = "; ".join(f"{arm}: " + ", ".join(f"{lr:g} {once(arm, 0, lr)['new']:.4f}" for lr in a.lrs) for arm in best)
    m = {arm: statistics.mean(v) for arm, v in means.items()}
    mixtures = ("sparse", "noise", "drop 0.5", "drop 0.5, official")
    below = {
        control: [arm for arm in mixtures if all(x < y for x, y in zip(means[arm], means[control], strict=True))]
        for control in ("dense, same tokens", "dense, same FLOPs")
    }
    drop = all(x < y for x, y in zip(means["drop 0.5"], means["sparse"], strict=True))
    outcome = (
        f"Below the dense control of the same tokens on every seed: {', '.join(below['dense, same tokens']) or 'none'}; "
        f"below the one of the same FLOPs: {', '.join(below['dense, same FLOPs']) or 'none'}. "
        f"Drop-Upcycling {'is' if drop else 'is NOT'} below sparse upcycling on every seed "
        f"({m['drop 0.5']:.4f} against {m['sparse']:.4f}). The control with every neuron drawn again ends at {m['drop 1 (control)']:.4f}."
    )
    notes = [
        f"{a.tokens:,} training tokens ({int(a.tokens * 4_087_808 / 3_022_848):,} for the FLOP-matched control), batch 8 x {CONTEXT}, "
        "no balance loss, mean ± sd over seeds",
        f"learning-rate sweep on seed 0, new text: {sweep}",
        "the papers' claims are for billions of tokens; this is a tiny model and a short run",
    ]
    return rows, outcome, notes


if __name__ == "__main__":
    main()
