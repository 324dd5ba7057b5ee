"""MoEfication: held-out loss against the number of experts, for ways to split and to choose; then one wide layer against
k_means_constrained. `python bench/moefy.py width` does the second alone. Needs scikit-learn and k-means-constrained for it."""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from common import SHARED, Cache, Clock, save
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.hooks import capture
from modelwright.reshape.experts.select import centres, least_squares, masses, train_mlp
from modelwright.reshape.experts.simulate import Plan, simulated
from modelwright.reshape.experts.split import contiguous, split_cmoe, split_coactivation, split_kmeans, split_random
from modelwright.reshape.moefy import strengths

SEEDS = [0, 1, 2]
SHARES = (0.2, 0.4, 0.6)  # of the experts that are on
MODELS = {"stories260K (SwiGLU)": 43, "seedling (SwiGLU)": 43, "made here (ReLU)": 16}  # and their experts
SPLITS = ("random", "contiguous", "kmeans", "coactivation", "cmoe", "cmoe, 1 in 8 shared")
FULL = ("kmeans",)  # splits with every way to choose
CHOICES = ("oracle", "mlp", "linear", "ridge", "similarity", "random choice")
ROWS, CONTEXT = 32, 128  # of calibration; half as many rows are held out


# ---- models and texts ------------------------------------------------------------------------------------------------
def relu_model(seed: int, text: bytes) -> Any:
    """A byte model with ReLU gates, trained here for 500 steps."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=4, hidden_act="relu", tie_word_embeddings=True, max_position_embeddings=256
    )
    model = transformers.LlamaForCausalLM(config)
    ids, g = torch.tensor(list(text)), torch.Generator().manual_seed(seed)
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)), 500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.stack([ids[i : i + 64] for i in torch.randint(len(ids) - 64, (16,), generator=g)])
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def setting(name: str, seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model, calibration rows and held-out rows of text that it was not tuned on here."""
    text = (SHARED / "tinyshakespeare" / "input.txt").read_text()[:900_000]
    half = len(text) // 2
    if name.startswith("made"):
        model = relu_model(seed, text[:half].encode())
        first, second = (torch.tensor(list(part.encode())) for part in (text[:half], text[half:]))
    else:
        source = Checkpoint(SHARED / "stories260K" / "hf" if name.startswith("stories") else "seedling")
        model, tokenizer = source.model(torch.float32).eval(), source.tokenizer()
        if name.startswith("stories"):
            lines = (SHARED / "tinyshakespeare" / "input.txt").read_text()
        else:
            import argparse

            lines = "".join(p.read_text() for p in sorted(Path(argparse.__file__).parent.glob("[a-d]*.py")))
        ids = torch.tensor(tokenizer(lines[:400_000], add_special_tokens=False)["input_ids"])
        first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    g = torch.Generator().manual_seed(seed)

    def rows(part: torch.Tensor, n: int) -> torch.Tensor:
        return torch.stack([part[i : i + CONTEXT] for i in torch.randint(len(part) - CONTEXT, (n,), generator=g)])

    return model, rows(first, ROWS), rows(second, ROWS // 2)


# ---- one model -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def held_out(model: Any, rows: torch.Tensor) -> float:
    return float(model(rows, labels=rows).loss)


@torch.no_grad()
def calibrate(model: Any, rows: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """By layer the input of the feed-forward part, the activations, and their strengths."""
    seen: dict[int, torch.Tensor] = {}
    at = {layer.mlp: i for i, layer in enumerate(model.model.layers)}
    with capture(at, lambda m, x: seen.__setitem__(at[m], x.reshape(-1, x.shape[-1])), side="input"):
        model(rows)
    found = {}
    for m, i in at.items():
        x = seen[i]
        h = m.act_fn(m.gate_proj(x)) * m.up_proj(x)
        s = strengths(x, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, m.act_fn)
        found[i] = {"x": x, "h": h, "strength": s}
    return found


def labels_of(split: str, mlp: Any, strength: torch.Tensor, experts: int, seed: int, layer: int) -> torch.Tensor:
    gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
    size = len(gate) // experts
    if split == "random":
        return split_random(len(gate), experts, seed, layer)
    if split == "contiguous":
        return contiguous(len(gate), experts)
    if split == "kmeans":
        return split_kmeans(gate, up, experts, "gate", seed)
    if split == "coactivation":
        return split_coactivation(strength, experts, seed)
    shared = max(1, experts // 8) if "shared" in split else 0
    return split_cmoe(strength, experts - shared, shared, size)


def mean_activation(c: dict[str, torch.Tensor], labels: torch.Tensor, score: Any, experts: int, k: int, when_off: bool) -> torch.Tensor:
    """Mean activation of each neuron (F,), over all tokens or over those at which its expert is off."""
    if not when_off:
        return c["h"].mean(0)
    chosen = score(c["x"], masses(c["strength"], labels, experts)).topk(k, 1).indices
    off = torch.ones(len(chosen), experts).scatter_(1, chosen, 0.0)[:, labels]
    return (c["h"] * off).sum(0) / off.sum(0).clamp(min=1)


def scorers(choice: str, mlp: Any, c: dict[str, torch.Tensor], labels: torch.Tensor, experts: int, k: int, seed: int, layer: int) -> Any:
    start = centres(mlp.gate_proj.weight.detach(), labels, experts)
    if choice == "oracle":
        return lambda x, mass: mass
    if choice == "random choice":
        g = torch.Generator().manual_seed(seed)
        return lambda x, mass: torch.rand(mass.shape, generator=g)
    if choice == "similarity":
        rows = torch.nn.functional.normalize(start, dim=1)
    else:
        mass = masses(c["strength"], labels, experts)
        if choice == "ridge":
            rows = least_squares(c["x"], mass)
        else:
            if choice == "mlp":
                c["router"] = train_mlp(c["x"], mass, start, k, epochs=10, seed=seed, layer=layer)
                return lambda x, mass, router=c["router"]: router(x)
            rows = least_squares(c["x"], c["router"](c["x"]))
    return lambda x, mass: x @ rows.T


def measure(name: str, seed: int) -> dict[str, float]:
    """Held-out loss in nats per token, by split, choice, share and compensation."""
    model, calibration, held = setting(name, seed)
    model.requires_grad_(False)
    stats, whole = calibrate(model, calibration), MODELS[name]
    found = {"dense": held_out(model, held)}
    for split in SPLITS:
        labels = {i: labels_of(split, m.mlp, stats[i]["strength"], whole, seed, i) for i, m in enumerate(model.model.layers)}
        experts = int(labels[0].max()) + 1
        for choice in CHOICES if split in FULL else ("oracle", "ridge"):
            score = {
                i: scorers(choice, m.mlp, stats[i], labels[i], experts, round(0.2 * whole), seed, i)
                for i, m in enumerate(model.model.layers)
            }
            for share in SHARES:
                k = round(share * whole) - (whole - experts)  # shared experts are on and count
                for extra in ("", " + mean", " + mean when off") if split in FULL and choice in ("oracle", "ridge") else ("",):
                    plans = {}
                    for i, own in labels.items():
                        mean = mean_activation(stats[i], own, score[i], experts, k, "off" in extra) if extra else None
                        plans[i] = Plan(own, score[i], k, mean)
                    with simulated(model, plans):
                        found[f"{split}|{choice}{extra}|{share}"] = held_out(model, held)
    return found


# ---- one wide layer --------------------------------------------------------------------------------------------------
WIDE = {"intermediate_size": 11008, "hidden_size": 4096}
EXPERTS, ROUNDS = 32, 1  # one round of theirs takes long enough


def wide(what: str) -> dict[str, float]:
    """In a process of its own: seconds and peak memory of converting one layer of Llama-2-7B's width, or of its clustering."""
    torch.manual_seed(0)
    if what == "layer":
        from modelwright.reshape.moefy import Knobs, moefy

        with tempfile.TemporaryDirectory() as folder:
            heads = {"num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 64}
            config = transformers.LlamaConfig(**WIDE, **heads, max_position_embeddings=512)
            transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
            (Path(folder) / "ids.jsonl").write_text(
                "".join(json.dumps({"input_ids": torch.randint(64, (256,)).tolist()}) + "\n" for _ in range(4))
            )
            done = subprocess.run([sys.executable, __file__, "stream", folder], capture_output=True, text=True, check=True)
            return json.loads(done.stdout.strip().splitlines()[-1])
    if what == "stream":
        from modelwright.reshape.moefy import Knobs, moefy

        data = {"path": str(Path(sys.argv[2]) / "ids.jsonl")}
        from modelwright.core.knobs import Data

        knobs = Knobs(experts=EXPERTS, top_k=8, router="ridge", data=Data(**data), tokens=1024, context=256)
        blueprint, _ = moefy(Checkpoint(sys.argv[2]), knobs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Clock() as c:
            for _ in blueprint.stream():
                pass
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        layer = 4 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # bytes in fp32
        return {"seconds": c.cpu, "layers": grown / layer}
    rows = torch.randn(11008, 4096)
    if what.startswith("ours"):
        from modelwright.moe.partition import balanced_kmeans

        with Clock() as c:
            inertia = balanced_kmeans(rows, EXPERTS, rounds=10 if what == "ours10" else ROUNDS)[2]
    else:
        from k_means_constrained import KMeansConstrained

        x = torch.nn.functional.normalize(rows, dim=1).double().numpy()
        size = len(x) // EXPERTS
        with Clock() as c:
            # tol 0 and the same number of rounds; one start, as the official code's ten would only multiply the time
            k = KMeansConstrained(EXPERTS, size_min=size, size_max=size, random_state=0, n_init=1, max_iter=ROUNDS, tol=0, n_jobs=1).fit(x)
        inertia = float(k.inertia_)
    return {"seconds": c.cpu, "inertia": inertia}


def child(what: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def width() -> None:
    cache = Cache("moefy")
    ours, ten, theirs, layer = (cache(["wide", what], lambda what=what: child(what)) for what in ("ours", "ours10", "theirs", "layer"))
    ratio = theirs["seconds"] / ours["seconds"]
    rows = [
        ["balanced k-means, ours, 1 round", ours["seconds"], f"{ours['inertia']:.2f}", ""],
        ["k_means_constrained, 1 round", theirs["seconds"], f"{theirs['inertia']:.2f}", f"{ratio:.1f} times ours"],
        ["balanced k-means, ours, 10 rounds", ten["seconds"], f"{ten['inertia']:.2f}", ""],
        [
            "whole layer: calibration, split, router, experts",
            layer["seconds"],
            "",
            f"peak memory grows by {layer['layers']:.2f} fp32 layers",
        ],
    ]
    save(
        "moefy_width",
        claim="One layer of Llama-2-7B's width (11,008 neurons, 4,096 inputs) is clustered at least 10 times faster than by "
        "k_means_constrained, and converted in at most 2 layers of memory.",
        outcome=f"{ratio:.1f} times faster with one round each (ten rounds of ours take {ten['seconds']:.1f} s, one of theirs "
        f"{theirs['seconds']:.1f} s); the conversion takes {layer['layers']:.2f} layers of memory.",
        columns=["task", "CPU seconds", "sum of squared distances", "remark"],
        rows=rows,
        seeds=[0],
        notes=[
            f"{EXPERTS} experts, one start each (k-means++, other draws), rows from N(0, 1): no clusters, the hardest case",
            "the official code starts ten times and goes on until it converges",
        ],
        command="python bench/moefy.py width",
    )


# ---- report ----------------------------------------------------------------------------------------------------------
def main() -> None:
    cache = Cache("moefy")
    found = {name: [cache([name, seed], lambda n=name, s=seed: measure(n, s)) for seed in SEEDS] for name in MODELS}
    rows, plots, wins = [], [], []
    for name, runs in found.items():
        mean = {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
        for key in dict.fromkeys(k.rpartition("|")[0] for k in mean if "|" in k):
            split, choice = key.split("|")
            rows.append([name, split, choice, *(f"{mean[f'{key}|{s}'] - mean['dense']:.3f}" for s in SHARES)])
        series = {c: [[100 * s, mean[f"kmeans|{c}|{s}"] - mean["dense"]] for s in SHARES] for c in CHOICES}
        plots.append(
            {"kind": "line", "title": f"{name}: k-means split", "x": "% of the experts on", "y": "rise of the loss", "series": series}
        )
        wins.append(verdict(name, runs, mean))
    save(
        "moefy",
        claim="Held-out loss: oracle < MLP router < similarity < random choice, and k-means and co-activation splits < random split, with "
        "a fifth of the experts on.",
        outcome=" ".join(wins),
        columns=["model", "split", "choice", *(f"{s:.0%} on" for s in SHARES)],
        rows=rows,
        seeds=SEEDS,
        notes=[
            "rise of the held-out loss over the dense model, nats per token, means over seeds (of split, router, text; the ReLU model too)",
            f"experts: {', '.join(f'{n} {e}' for n, e in MODELS.items())}; calibration on {ROWS * CONTEXT:,} tokens",
            "random with ridge is LLaMA-MoE's split with a router in closed form; cmoe is CMoE's split; + mean adds what the other "
            "neurons give on average (over all tokens, or where they are off); no stock class has a place for it, an MLP or an oracle",
        ],
        plots=plots,
    )


def verdict(name: str, runs: list[dict[str, float]], mean: dict[str, float]) -> str:
    """Which parts of the claim hold in all seeds, at a fifth of the experts."""

    def holds(a: str, b: str) -> str:
        n = sum(r[f"{a}|0.2"] < r[f"{b}|0.2"] for r in runs)
        return "holds" if n == len(runs) else f"holds in {n} of {len(runs)} seeds"

    parts = {
        "oracle < MLP": ("kmeans|oracle", "kmeans|mlp"),
        "MLP < similarity": ("kmeans|mlp", "kmeans|similarity"),
        "similarity < random choice": ("kmeans|similarity", "kmeans|random choice"),
        "k-means < random split (oracle)": ("kmeans|oracle", "random|oracle"),
        "co-activation < k-means (oracle)": ("coactivation|oracle", "kmeans|oracle"),
        "ridge < distilled MLP": ("kmeans|ridge", "kmeans|linear"),
    }
    said = "; ".join(f"{text} {holds(*pair)}" for text, pair in parts.items())
    best = min((k for k in mean if k.endswith("|0.2") and k.split("|")[1] in ("linear", "ridge", "similarity")), key=mean.__getitem__)
    split, choice, _ = best.split("|")
    return f"{name}: {said}; the best that a stock class holds, {split} with {choice}, loses {mean[best] - mean['dense']:.2f} nats."


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "width":
        width()
    else:
        print(json.dumps(wide(sys.argv[1])))
