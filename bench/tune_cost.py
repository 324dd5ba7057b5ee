"""What a step costs: HFT and MIGU beside full tuning, packed beside padded rows, and the bytes of optimizer state.

One thread; CPU seconds from step to step of the same training loop, arms interleaved in rounds, the first steps of each run left out.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import SHARED, save, spread
from modelwright import registry
from modelwright.core.data.packing import Texts, packed, padded
from modelwright.core.data.rows import Rows
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.train.loop import fit

ARMS = {"full": ("full", {}), "HFT": ("hft", {}), "MIGU": ("migu", {}), "MIGU, guard update": ("migu", {"guard": "update"})}
STEPS, SKIP = 7, 2


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8
        )
    )


def steps(of, rows: Rows, train: Train, name: str, settings: dict) -> tuple[list[float], int]:
    """CPU seconds of each step, and bytes of the optimizer's state as saved."""
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        techniques = registry.techniques_named(name, settings)
        fit(
            of,
            rows,
            train,
            techniques=techniques,
            evals={},
            folder=Path(folder),
            seed=0,
            tick=lambda a, b: marks.append(time.process_time()),
        )
        state = max((p.stat().st_size for p in Path(folder).glob("checkpoint-*/optimizer.pt")), default=0)
    # the interval that ends with saving is left out
    return [b - a for a, b in zip(marks, marks[1:], strict=False)][SKIP - 1 :], state


def lengths() -> tuple[Texts, dict]:
    """Real texts of four tasks, tokenised, short and long mixed."""
    tokenizer, texts = Checkpoint("seedling").tokenizer(), Texts()
    rows = [
        r["sentence"]
        for n in ("agnews", "sst-2", "qqp", "amazon")
        for r in json.loads((SHARED / "cl15" / f"{n}.json").read_text())["train"][:300]
    ]
    random.Random(0).shuffle(rows)
    for ids in tokenizer(rows)["input_ids"]:
        texts.ids.append(ids[:512])
        texts.weights.append([1.0] * len(ids[:512]))
    return texts, {}


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rounds", type=int, default=5)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2048, (STEPS * 4, 128), generator=g, dtype=torch.int32)
    rows = Rows(ids, ids.clone(), torch.full((len(ids),), 128))
    train = Train(epochs=1, batch=4, context=128, record=False, save_every=STEPS, warmup=0)
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    state: dict[str, int] = {}
    for _ in range(a.rounds):
        for arm, (name, settings) in ARMS.items():
            seconds, state[arm] = steps(model(), rows, train, name, settings)
            taken[arm].append(statistics.median(seconds))
    ratio = {arm: [x / y for x, y in zip(taken[arm], taken["full"], strict=True)] for arm in ARMS}
    texts, _ = lengths()
    speed: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(a.rounds):
        for form in speed:
            made = padded(texts, 512) if form == "padded" else packed(texts, 512, 8, 0)
            some = made.split(8 * STEPS)[0] if len(made) > 8 * STEPS else made
            train = Train(epochs=1, batch=8, context=512, record=False, save_every=10**3, warmup=0)
            seconds, _ = steps(Checkpoint("seedling").model(), some, train, "full", {})
            speed[form].append(some.tokens / STEPS / statistics.mean(seconds))
    gain = [p / q for p, q in zip(speed["packed"], speed["padded"], strict=True)]
    mean = sum(map(len, texts.ids)) / len(texts)
    middle = {arm: statistics.median(v) for arm, v in ratio.items()}
    save(
        "tune_cost",
        claim="A step of HFT takes at most 0.75 of full tuning's, one of MIGU at most 1.05; packing trains more tokens a second",
        outcome=f"HFT {middle['HFT']:.2f}, MIGU {middle['MIGU']:.2f} of a full step; packed rows {statistics.median(gain):.2f} times the "
        "tokens a second. Half of the weights' gradients are a sixth of a step's arithmetic: where that decides, 0.75 is out of reach.",
        columns=["arm", "step beside full tuning", "CPU seconds a step", "optimizer state, bytes"],
        rows=[[arm, spread(ratio[arm]), spread(taken[arm]), f"{state[arm]:,}"] for arm in ARMS]
        + [
            [f"{form} rows", spread(gain) if form == "packed" else "1", f"{statistics.median(v):,.0f} tokens a second", ""]
            for form, v in speed.items()
        ],
        notes=[
            "median (lowest to highest) over rounds; 6 blocks of width 512, 4 x 128 tokens a step, AdamW fused, one thread",
            f"real texts of 4 classification tasks, mean {mean:.0f} tokens, longest 512; padded batches end at their longest row",
        ],
    )


if __name__ == "__main__":
    main()
