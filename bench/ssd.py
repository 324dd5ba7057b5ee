"""SSD against dense training at equal tokens and at equal FLOPs, and what each loses when only a quarter of its experts runs.

A Llama of ReLU layers (64 wide, 2 blocks, 256 neurons) learns tiny Shakespeare as bytes from nothing. Sparse inference: the neurons of the
trained model are clustered (balanced k-means), a token runs through the experts nearest to it; for the dense model this is MoEfication
after training. Speed: one feed-forward part 1024 wide at a fifth of its experts, against the same part dense, in the same run.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import SHARED, save
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.moe.partition import balanced_kmeans
from modelwright.tune.neurons.layer import Layer
from modelwright.tune.ssd import Knobs, Ssd

CONTEXT, BATCH, EXPERTS, TOP_K = 64, 16, 16, 4
HOW: dict[str, Any] = {"experts": EXPERTS, "top_k": TOP_K, "check_every": 25, "stable": 0.8, "zeros": 0.5}


def model_of(seed: int, width: int = 64, neurons: int = 256, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, hidden_act="relu", max_position_embeddings=CONTEXT, pad_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip


def rows() -> tuple[Rows, Rows]:
    text = next((SHARED / "tinyshakespeare").rglob("*.txt")).read_bytes()
    ids = torch.tensor(list(text[: len(text) // CONTEXT * CONTEXT]), dtype=torch.int32).view(-1, CONTEXT)
    whole = Rows(ids, ids.clone(), torch.full((len(ids),), CONTEXT))
    learn, held = whole.split(len(ids) - 200)
    return learn, held


def trained(technique: Technique, seed: int, tokens: int, learn: Rows) -> Any:
    model = model_of(seed)
    settings = Train(
        tokens=tokens, lr=3e-3, batch=BATCH, context=CONTEXT, eval_every=10**6, save_every=10**6, record=False, weight_decay=0.1
    )
    with tempfile.TemporaryDirectory() as tmp:
        fit(model, learn, settings, techniques=[technique], evals={}, folder=Path(tmp), seed=seed)
        return technique.export(model, Path(tmp))


def sparse_loss(model: Any, held: Rows) -> float:
    """Held-out loss with TOP_K of EXPERTS; the model is changed."""
    anatomy = Anatomy(model)
    for b in anatomy.blocks:
        layer = Layer(model, anatomy, b, EXPERTS, TOP_K)
        layer.permute(balanced_kmeans(layer.rows().detach(), EXPERTS)[0].argsort(stable=True), None)
        layer.module.forward = layer.sparse
    return evaluate_rows(model, held, 20)["loss"]


def measured(arm: str, seed: int, tokens: int, learn: Rows, held: Rows) -> dict[str, Any]:
    technique: Any = Technique() if arm == "dense" else Ssd(Knobs(train=Train(weight_decay=0.1), **HOW))
    model = trained(technique, seed, tokens, learn)
    found: dict[str, Any] = {"dense": evaluate_rows(model, held, 20)["loss"]}
    found |= {"gap": sparse_loss(model, held) - found["dense"], "share": 1.0, "turns": 0, "tokens": tokens}
    if arm != "dense":
        found |= {"share": technique.flops["spent"] / technique.flops["dense"], "turns": len(technique.turns)}
        found["similarity"] = [look["similarity"] for look in technique.looks]
        found["zeros"] = technique.looks[-1]["zeros"]
    return found


@torch.no_grad()
def speed() -> float:
    """Time of the dense part over that of a fifth of its experts, the best of seven each."""
    model = model_of(0, width=1024, neurons=4000, layers=1).eval()
    layer = Layer(model, Anatomy(model), Anatomy(model).blocks[0], 20, 4)
    x, best = torch.randn(1, 512, 1024), {}
    for name, run in (("dense", layer.module), ("sparse", layer.sparse)):
        times = []
        for _ in range(7):
            began = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - began)
        best[name] = min(times)
    return best["dense"] / best["sparse"]


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--tokens", type=int, default=300_000)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    learn, held = rows()
    found: dict[str, list[dict[str, Any]]] = {"dense": [], "SSD, same tokens": [], "SSD, same FLOPs": []}
    for seed in range(a.seeds):
        found["dense"].append(measured("dense", seed, a.tokens, learn, held))
        found["SSD, same tokens"].append(same := measured("SSD", seed, a.tokens, learn, held))
        found["SSD, same FLOPs"].append(measured("SSD", seed, round(a.tokens / same["share"]), learn, held))
        print(seed, {k: v[-1] for k, v in found.items()}, flush=True)
    faster = speed()
    dense = [s["dense"] for s in found["dense"]]
    table = []
    for arm, seeds in found.items():
        flops = [s["share"] * s["tokens"] / a.tokens for s in seeds]
        cells = [f"{statistics.mean(c):.4f} ± {statistics.stdev(c):.4f}" for c in ([s["dense"] for s in seeds], [s["gap"] for s in seeds])]
        table.append([arm, *cells, f"{statistics.mean(flops):.3f}", f"{statistics.mean(s['turns'] for s in seeds):.1f}"])
    won = sum(s["dense"] < d for s, d in zip(found["SSD, same FLOPs"], dense, strict=True))
    less = sum(s["gap"] < d["gap"] for s, d in zip(found["SSD, same tokens"], found["dense"], strict=True))
    looks = found["SSD, same tokens"][0]["similarity"]
    save(
        "ssd",
        claim="SSD ends below dense training at equal FLOPs, loses less when only a quarter of experts runs, and sparse inference is up "
        "to twice as fast (2410.03440)",
        outcome=f"At equal FLOPs SSD ends below dense training on {won} of {a.seeds} seeds. Its loss from sparse inference is smaller on "
        f"{less} of {a.seeds} seeds. A part 1024 wide runs {faster:.2f} times as fast with a fifth of its experts.",
        columns=["arm", "held-out loss, dense", "sparse inference adds", "training FLOPs, of dense training's", "sparse turns"],
        rows=table,
        seeds=list(range(a.seeds)),
        notes=[
            f"{a.tokens:,} tokens, {TOP_K} of {EXPERTS} experts, looks every {HOW['check_every']} dense steps, asked for: similarity "
            f"{HOW['stable']} and {HOW['zeros']:.0%} zeros; nats per byte, mean ± sd; clustering is not in the FLOPs",
            "similarity of the groups at each look, first seed: " + ", ".join(f"{x:.2f}" for x in looks[1:]),
            f"zero activations at the last look, first seed: {found['SSD, same tokens'][0]['zeros']:.2f}",
        ],
    )


if __name__ == "__main__":
    main()
