"""UpIT against copies: does a mixture of a run's checkpoints with trained routing vectors learn faster, and are its routers told apart?

Two tasks. `toy`: a small Llama learns three made languages one after the other; its checkpoints are those after each. `text`: the seedling
is tuned on four kinds of real text mixed (web pages, code, encyclopedia, Japanese), with a checkpoint after each quarter of the run.
Arms, all with as many experts and post-trained on the same rows: UpIT; its checkpoints with a random router (control: is it the
vectors?); UpIT with the paper's one-class loss; copies of the last checkpoint with a random router (sparse upcycling).
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modelwright
from common import SHARED, save
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.model.writer import copy_companions
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.moe.load import divergence, expert_load
from modelwright.testing import write_jsonl

ARMS = ("UpIT", "UpIT, one-class vectors", "checkpoints, random router", "copies, random router")
CONTEXT = 64


def toy(seed: int, rows: int = 144) -> dict[str, Rows]:
    """Three languages: each has its own table of which 4 of 60 words may follow a word."""
    found = {}
    for d in range(3):
        g = torch.Generator().manual_seed(100 * seed + d)
        table = torch.randint(3, 63, (63, 4), generator=g)
        ids = torch.randint(3, 63, (rows, 1), generator=g)
        for _ in range(CONTEXT - 1):
            ids = torch.cat([ids, table[ids[:, -1]].gather(1, torch.randint(4, (rows, 1), generator=g))], 1)
        ids = ids.int()
        found[f"language {d}"] = Rows(ids, ids.clone(), torch.full((rows,), CONTEXT))
    return found


def text(seed: int, rows: int = 144) -> dict[str, Rows]:
    tokenizer, found = Checkpoint("seedling").tokenizer(), {}
    for name in ("c4", "code_stack", "en_wikipedia", "ja_mc4"):
        documents = read(Data(path=str(SHARED / "five_domain_text" / f"{name}.txt")))
        made = tokenize(documents, tokenizer, len(tokenizer), CONTEXT)
        order = torch.randperm(len(made) - 1, generator=torch.Generator().manual_seed(seed))[:rows]
        found[name] = Rows(made.ids[order], made.labels[order], made.lengths[order])
    return found


def join(parts: list[Rows]) -> Rows:
    """Rows of the domains in turn."""
    n = min(len(p) for p in parts)
    each = [torch.stack([getattr(p, k)[:n] for p in parts], 1).flatten(0, 1) for k in ("ids", "labels", "lengths")]
    return Rows(*each)


def cut(rows: Rows, low: int, high: int) -> Rows:
    return Rows(rows.ids[low:high], rows.labels[low:high], rows.lengths[low:high])


def train(base: Any, rows: Rows, to: Path, seed: int, epochs: float, lr: float, evals: dict[str, Rows]) -> Any:
    settings = Train(epochs=epochs, lr=lr, batch=8, context=CONTEXT, eval_every=6, save_every=10**6, record=False, schedule="constant")
    return fit(base, rows, settings, techniques=[Technique()], evals=evals, folder=to, seed=seed)


def keep(model: Any, to: Path, source: Path) -> Path:
    model.save_pretrained(to)
    copy_companions(Checkpoint(source), to)
    return to


def run_of(task: str, seed: int, tmp: Path) -> tuple[Path, list[Path], dict[str, Rows], dict[str, Rows]]:
    """The base, the checkpoints of the run, and the rows of each domain: for training, held out."""
    domains = (toy if task == "toy" else text)(seed)
    learn = {n: cut(r, 0, 120) for n, r in domains.items()}
    held = {n: cut(r, 120, 144) for n, r in domains.items()}
    if task == "toy":
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=63, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        base = tmp / "base"
        LlamaForCausalLM(config).save_pretrained(base)
        parts = list(learn.values())
    else:
        base, whole = Checkpoint("seedling").folder, join(list(learn.values()))
        parts = [cut(whole, i * len(whole) // 4, (i + 1) * len(whole) // 4) for i in range(4)]
    model, kept = Checkpoint(base).model(), []
    for i, rows in enumerate(parts):
        train(model, rows, tmp / f"part{i}", seed, 4 if task == "toy" else 1, 3e-3 if task == "toy" else 1e-3, {})
        kept.append(keep(model, tmp / f"checkpoint-{i}", base))
    return base, kept, learn, held


def measured(task: str, seed: int, tmp: Path) -> dict[str, dict[str, float]]:
    base, kept, learn, held = run_of(task, seed, tmp)
    rows, found = join(list(learn.values())), {}
    data = write_jsonl(tmp / "rows.jsonl", [{"input_ids": r.tolist()} for r in rows.ids])
    experts = len(kept)
    for arm in ARMS:
        to, kind = tmp / arm, {"certificate": "structure"}
        if arm.startswith("copies"):
            knobs: dict[str, Any] = {"experts": experts, "top_k": 2}
            modelwright.run("reshape.upcycle", base=kept[-1], to=to, seed=seed, save=kind, **knobs)
        else:
            knobs = {"checkpoints": [str(k) for k in kept], "experts": experts, "top_k": 2, "context": CONTEXT, "data": data}
            knobs |= {"seed_rows": 48, "router": "random" if "random" in arm else "trained", "negatives": "one-class" not in arm}
            modelwright.run("reshape.upit", base=base, to=to, seed=seed, save=kind, **knobs)
        model = Checkpoint(to).model()
        before = torch.stack([expert_load(model, r) for r in held.values()])
        outcome = train(model, rows, tmp / f"post {arm}", seed, 0.5, 1e-3, {"held": join(list(held.values()))})
        after = torch.stack([expert_load(outcome.model, r) for r in held.values()])
        curve = [e["loss"] for e in outcome.evals]
        found[arm] = {
            "start": curve[0],
            "area": sum((a + b) / 2 for a, b in zip(curve, curve[1:], strict=False)) / (len(curve) - 1),
            "end": curve[-1],
            "before": float(divergence(before).mean()),
            "after": float(divergence(after).mean()),
        }
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    table, claims = [], []
    for task in ("toy", "text"):
        seeds = []
        for s in range(a.seeds):
            with tempfile.TemporaryDirectory() as tmp:
                seeds.append(measured(task, s, Path(tmp)))
            print(task, s, seeds[-1], flush=True)
        for arm in ARMS:
            cells = [[s[arm][k] for s in seeds] for k in ("start", "area", "end", "before", "after")]
            table.append([task, arm, *(f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in cells)])
        for other in ARMS[1:]:
            won = sum(s["UpIT"]["area"] < s[other]["area"] for s in seeds)
            more = sum(s["UpIT"]["after"] > s[other]["after"] for s in seeds)
            claims.append(f"{task}: UpIT against {other}: less early loss on {won} of {len(seeds)} seeds, routers more apart on {more}")
    save(
        "upit",
        claim="checkpoints as experts with trained routing vectors have less early loss than copies with a random router, and routers that "
        "tell domains apart (2410.01610)",
        outcome=". ".join(claims) + ".",
        columns=["task", "arm", "loss at the start", "mean loss while post-training", "at the end", "domain bits before", "after"],
        rows=table,
        seeds=list(range(a.seeds)),
        notes=[
            "top 1 of as many experts as checkpoints, half a pass of post-training, mean ± sd; bits: Jensen-Shannon divergence of the loads"
        ],
    )


if __name__ == "__main__":
    main()
