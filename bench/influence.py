"""Simulators of training on recorded runs: a tiny decoder on sentences of SST-2, a fifth of the training sentences with shuffled words.

Three families of runs (another model, other sentences), each of 18 runs to learn from and 4 to measure on, 30 steps of AdamW.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import SHARED, Clock, save, spread
from modelwright.core.train.recorder import Recorder
from modelwright.inspect.simulate import features
from modelwright.inspect.simulate import simulators as s
from modelwright.inspect.simulate.runs import Runs, read_runs

TRAIN, TESTS, RUNS, HELD, STEPS, BATCH, LR = 60, 40, 18, 4, 30, 4, 2e-3
FILE = SHARED / "text_sst2"


def sentences(seed: int) -> tuple[list[list[str]], list[list[str]], list[bool]]:
    g = np.random.default_rng(seed)
    file = sorted(FILE.glob("*train*"))[0]
    lines = [line.split("\t")[0].split()[:14] for line in file.read_text().splitlines()[1:3000]]
    lines = [w for w in lines if len(w) > 5]
    chosen = [lines[i] for i in g.choice(len(lines), TRAIN + TESTS, replace=False)]
    noisy = [i % 5 == 0 for i in range(TRAIN)]
    train = [list(g.permutation(w)) if n else w for w, n in zip(chosen[:TRAIN], noisy, strict=True)]
    return train, chosen[TRAIN:], noisy


def model_of(vocab: int, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=32, **sizes))
    model.set_attn_implementation("eager")
    return model


def losses(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="none").view(len(ids), -1)
    return each.sum(1) / (ids[:, 1:] >= 0).sum(1)


def record(start, train: torch.Tensor, tests: torch.Tensor, order: list[int], file: Path) -> np.ndarray:
    """One run of plain AdamW, recorded; the last losses of the tests."""
    import copy

    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    recorder = Recorder(file)
    for step in range(STEPS + 1):
        with torch.no_grad():
            now = losses(model, tests)
        for m, value in enumerate(now.tolist()):
            recorder.eval(step, f"t{m:02d}", value, 1)
        if step < STEPS:
            batch = order[step * BATCH : (step + 1) * BATCH]
            each = losses(model, train[batch])
            recorder.train(step + 1, LR, torch.tensor(batch), each.detach(), torch.ones(len(batch), dtype=torch.long))
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
    recorder.close(STEPS)
    return now.numpy()


def order_of(seed: int, allowed: list[int]) -> list[int]:
    g = np.random.default_rng(seed)
    return [int(i) for _ in range(STEPS * BATCH // len(allowed) + 1) for i in g.permutation(allowed)]


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.stack([F.pad(r, (0, longest - len(r)), value=-100) for r in rows])


def simulate(train: Runs, test: Runs, h: torch.Tensor, to: torch.Tensor, kernel: np.ndarray) -> dict[str, np.ndarray]:
    found = {"constant": s.constant(train, test), "mean curve": s.mean_curve(train, test)}
    found["tables"] = s.by_tables(*s.tables(train, 1e-2), test)
    for how in ("one_step", "roll_out"):
        model = s.fit_gptfluence(train, h, to, order=1, objective=how, epochs=200, lr=3e-3, seed=0, tick=lambda n: None)
        found[f"gptfluence, {how}"] = s.by_gptfluence(model, h, to, test)
    return found | {"tracin": s.tracin(train, test, kernel), "gradient kernel": s.gradient_kernel(train, test, kernel)}


def unseen(train: Runs, test: Runs, h: torch.Tensor, to: torch.Tensor, kernel: np.ndarray) -> dict[str, dict[str, float]]:
    """Learnt on half of the tests, measured on the others."""
    a, b = np.arange(TESTS // 2), np.arange(TESTS // 2, TESTS)
    model = s.fit_gptfluence(train.only(a), h, to[a], order=1, objective="roll_out", epochs=200, lr=3e-3, seed=0, tick=lambda n: None)
    rise = (train.only(a).phi - train.only(a).phi[:, :1]).mean((0, 2))
    known, other = train.only(a), test.only(b)
    steps = known.seen.shape[1]
    x = np.concatenate([s._kernel_features(known.phi[:, t], known, kernel[:, a], t).reshape(-1, 5) for t in range(steps)])
    y = np.concatenate([(known.phi[:, t + 1] - known.phi[:, t]).ravel() for t in range(steps)])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    phi = [other.phi[:, 0]]
    for t in range(steps):
        phi.append(phi[-1] + s._kernel_features(phi[-1], other, kernel[:, b], t) @ w)
    found = {
        "constant": s.constant(known, other),
        "mean change": other.phi[:, :1] + rise[None, :, None],
        "gptfluence, roll_out": s.by_gptfluence(model, h, to[b], other),
        "gradient kernel": np.stack(phi, 1),
    }
    return {k: s.errors(v, other.phi) for k, v in found.items()}


def family(seed: int) -> dict:
    words, tests, noisy = sentences(seed)
    vocab = {w: i for i, w in enumerate(sorted({w for r in (*words, *tests) for w in r}))}
    rows = [torch.tensor([vocab[w] for w in r]) for r in (*words, *tests)]
    train, held = padded(rows[:TRAIN]), padded(rows[TRAIN:])
    start = model_of(len(vocab), seed)
    everyone = list(range(TRAIN))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{k:02d}.parquet" for k in range(RUNS + HELD)]
        for k, f in enumerate(files):
            record(start, train, held, order_of(1000 * seed + k, everyone), f)
        runs = read_runs(files)
        learnt, test = runs.take(slice(0, RUNS)), runs.take(slice(RUNS, None))
        texts = features.words([" ".join(r) for r in (*words, *tests)])
        h, to = texts[:TRAIN], texts[TRAIN:]
        gradients = features.gradients(start, rows)
        kernel = (gradients[:TRAIN] @ gradients[TRAIN:].T).double().numpy()
        found = simulate(learnt, test, h, to, kernel)
        result = {"seen": {k: s.errors(v, test.phi) for k, v in found.items()}, "unseen": unseen(learnt, test, h, to, kernel)}
        a, b = s.tables(learnt, 1e-2)
        effects = s.left_out_effects(a[None], b, learnt)
        rank = np.argsort(effects.mean(1))
        result["noisy"] = float(np.mean([noisy[i] for i in rank[: TRAIN // 5]]))
        g, final = np.random.default_rng(seed), {}
        fifth = TRAIN // 5
        sets = {
            "nothing": [],
            "predicted harmful": rank[:fifth].tolist(),
            "random": g.choice(TRAIN, fifth, replace=False).tolist(),
            "predicted helpful": rank[-fifth:].tolist(),
        }
        for name, gone in sets.items():
            keep = [i for i in everyone if i not in gone]
            final[name] = float(
                np.mean([record(start, train, held, order_of(77 + k, keep), Path(folder) / f"x{name}{k}.parquet") for k in range(2)])
            )
        result["dropped"] = final
        subsets = [g.choice(TRAIN, TRAIN // 2, replace=False).tolist() for _ in range(10)]
        truth = np.stack([record(start, train, held, order_of(7, keep), Path(folder) / f"s{k}.parquet") for k, keep in enumerate(subsets)])
        inside = np.array([[i in keep for i in everyone] for keep in map(set, subsets)], float)
        result["lds"] = {"tables": s.lds(-inside @ effects, truth), "gradient products (TracIn)": s.lds(-inside @ kernel, truth)}
        result["between"] = float(runs.phi[:, -1].var(0).mean())
    return result


def main() -> None:
    torch.set_num_threads(1)
    seeds = [0, 1, 2]
    with Clock() as clock:
        found = [family(k) for k in seeds]
    rows = []
    for part, title in (("seen", "runs not seen"), ("unseen", "runs and tests not seen")):
        for name in found[0][part]:
            rows.append([title, name, *(spread([f[part][name][k] for f in found]) for k in ("mse", "mae", "final_rho"))])
    rows += [
        ["last loss after training again", f"without {n}", spread([f["dropped"][n] for f in found]), "", ""] for n in found[0]["dropped"]
    ]
    rows += [["LDS over ten halves, trained again", n, spread([f["lds"][n] for f in found]), "", ""] for n in found[0]["lds"]]
    rows.append(["share of shuffled sentences among the predicted harmful", "chance .2", spread([f["noisy"] for f in found]), "", ""])
    others = [n for n in found[0]["seen"] if n not in ("constant", "mean curve")]
    wins = {n: sum(f["seen"][n]["mse"] < f["seen"]["mean curve"]["mse"] for f in found) for n in others}
    better = sum(f["dropped"]["predicted harmful"] < f["dropped"]["random"] for f in found)
    save(
        "influence",
        claim="simulators beat the mean curve of the runs, and predicted-harmful examples are better dropped than random ones",
        outcome=f"better than the mean curve in families: {', '.join(f'{n} {k} of 3' for n, k in wins.items())}; "
        f"dropping the predicted-harmful fifth beats dropping a random fifth in {better} of 3",
        columns=["measured on", "simulator", "MSE over all steps, or as said", "MAE", "rho at the end"],
        rows=rows,
        seeds=seeds,
        notes=[f"variance of the last loss between runs: {spread([f['between'] for f in found])}", f"{clock.cpu:.0f} CPU seconds",
               "vectors are hashed words; MiniLM's, as in the paper, were not tried"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
