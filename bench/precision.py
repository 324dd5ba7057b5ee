"""A bf16 checkpoint tuned beside its fp32 original: held-out loss of each way to tune, and of other ways to hold the weights.

Weights that train are held in fp32 whatever is stored, so the two must end together. Rows beside it: weights held in bf16 with stochastic
rounding, weights held in bf16 without (which moves next to nothing), and TRL's SFTTrainer on the bf16 model as it loads it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import modelwright
from common import SHARED, Cache, save
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.testing import in_bf16

TOKENS, CONTEXT, LR, SEEDS = 40_000, 128, 2e-5, [0, 1, 2]
TRAIN = {"tokens": TOKENS, "context": CONTEXT, "batch": 8, "lr": LR, "eval_every": 10**6, "save_every": 10**6, "record": False}
DENSE: dict[str, dict[str, Any]] = {
    "tune.full": {},
    "tune.hft": {},
    "tune.migu": {},
    "tune.key_value": {},
    "tune.lora": {"train": {"lr": 1e-3}},
    "tune.lora_moe": {"experts": 4, "r": 4, "train": {"lr": 1e-3}},
}
SPARSE: dict[str, dict[str, Any]] = {
    "tune.gw_moe": {"threshold": 0.5, "unit": "share"},
    "tune.rectify": {"factor": 1.0},
    "tune.balance": {},
}
HELD = {"stored, stochastic rounding": {"weights": "stored", "rounding": "stochastic"}, "stored, rounded to nearest": {"weights": "stored"}}


def tuned(base: Path, method: str, knobs: dict[str, Any], data: Path, seed: int, **train: Any) -> float | str:
    """The last held-out loss, or why it was stopped."""
    own = {**TRAIN, **knobs.get("train", {}), **train}
    rest = {k: v for k, v in knobs.items() if k != "train"}
    texts = {"data": str(data / "train.txt"), "evals": {"held out": str(data / "held.txt")}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = modelwright.run(
                method, base=base, to=Path(folder) / "out", seed=seed, train=own, save={"certificate": "structure"}, **texts, **rest
            )
        except modelwright.UserError as error:
            return f"stopped: {error.what}"
    return float(result.steps[0]["evals"][-1]["loss"])


def by_trl(base: Path, data: Path, seed: int) -> float:
    """SFTTrainer on the model as transformers loads it, by the same rows and steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from modelwright.core.data.make import make_rows
    from modelwright.core.knobs import Data
    from modelwright.core.train.evaluate import evaluate_rows

    source = Checkpoint(base)
    tokenizer, model = source.tokenizer(), source.model()
    vocab = int(model.config.vocab_size)
    rows = make_rows(Data(path=str(data / "train.txt")), tokenizer, vocab, CONTEXT)
    items = Dataset.from_list([{"input_ids": rows[i]["input_ids"].tolist()} for i in range(len(rows))])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=round(TOKENS / (8 * CONTEXT)),
            per_device_train_batch_size=8,
            learning_rate=LR,
            warmup_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            max_length=CONTEXT,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        SFTTrainer(model, arguments, train_dataset=items, processing_class=tokenizer).train()
    return evaluate_rows(model, make_rows(Data(path=str(data / "held.txt")), tokenizer, vocab, CONTEXT), 8)["loss"]


def main() -> None:
    torch.set_num_threads(1)
    silence_transformers()
    known, rows, gaps = Cache("precision"), [], []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        text = (SHARED / "tinyshakespeare" / "input.txt").read_text()
        (folder / "train.txt").write_text(text[:400_000])
        (folder / "held.txt").write_text(text[-20_000:])
        dense = SHARED / "stories260K" / "hf"
        sparse = folder / "moe"
        modelwright.run("reshape.upcycle", base=dense, to=sparse, experts=4, top_k=2)
        bases = {"dense": (dense, in_bf16(dense, folder / "dense16")), "sparse": (sparse, in_bf16(sparse, folder / "sparse16"))}
        for kind, methods in (("dense", DENSE), ("sparse", SPARSE)):
            for method, knobs in methods.items():
                for seed in SEEDS if method == "tune.full" else SEEDS[:1]:
                    full, half = (
                        known([method, seed, n], lambda b=b, s=seed, m=method, k=knobs: tuned(b, m, k, folder, s))
                        for n, b in zip(("fp32", "bf16"), bases[kind], strict=True)
                    )
                    gaps.append(abs(full - half))
                    rows.append([method, seed, f"{full:.4f}", f"{half:.4f}", f"{half - full:+.4f}"])
        full = next(float(r[2]) for r in rows if r[0] == "tune.full" and r[1] == 0)
        for name, settings in HELD.items():
            found = known([name], lambda s=settings: tuned(bases["dense"][1], "tune.full", {}, folder, 0, **s))
            rows.append([f"tune.full, {name}", 0, f"{full:.4f}", *_told(found, full)])
        found = known(["trl"], lambda: by_trl(bases["dense"][1], folder, 0))
        rows.append(["TRL SFTTrainer, bf16 weights", 0, f"{full:.4f}", *_told(found, full)])
        before = known(["before"], lambda: tuned(bases["dense"][1], "tune.full", {}, folder, 0, tokens=8 * CONTEXT, lr=1e-12))
    save(
        "precision",
        claim="A bf16 checkpoint ends within 0.01 nats of its fp32 original under every way to tune; stochastic rounding within 0.02",
        outcome=f"Largest gap of the methods: {max(gaps):.4f} nats. " + "; ".join(f"{r[0]}: {r[4] or r[3]}" for r in rows[-3:]) + ".",
        columns=["way to tune", "seed", "fp32, nats", "bf16, nats", "gap"],
        rows=rows,
        seeds=SEEDS,
        notes=[
            f"stories260K on tiny Shakespeare, {TOKENS:,} tokens, context {CONTEXT}, lr {LR} (adapters 1e-3); upcycled to 4 experts for "
            f"gw_moe, rectify and balance; before training: {json.dumps(before)}"
        ],
    )


def _told(found: float | str, full: float) -> list[str]:
    return [found, ""] if isinstance(found, str) else [f"{found:.4f}", f"{found - full:+.4f}"]


if __name__ == "__main__":
    main()
