"""Reward hacking: PPO against a reward that likes length, as it is and with the length taken out by reward.calibrate (arXiv 2409.17407).

A small Llama over 8 words writes at most 48 tokens and may end at any of them. The quality of a response is 4 times the share of word 3 in
it; the reward that is trained on adds 0.1 for each token. Beside it stand the same reward calibrated on 1,000 responses of the untrained
policy, and the control: the quality itself. Shown are length and quality over the updates.
"""

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from common import Cache, save, spread
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.knobs import Train
from modelwright.core.train.loop import fit
from modelwright.reward.calibrate import Calibrator
from modelwright.reward.table.wrapper import CalibratedFunction
from modelwright.rl.ppo import Knobs, Ppo
from modelwright.rl.rollout.sample import Sampling, responses

SEEDS, UPDATES, LENGTH, BATCH = [0, 1, 2], 30, 48, 64
VARIANTS = ("length-biased", "calibrated", "quality")


def quality(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [4 * sum(t == 3 for t in ids) / len(ids) for ids in completion_ids]


def biased(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [q + 0.1 * len(ids) for q, ids in zip(quality(completion_ids), completion_ids, strict=True)]


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 8, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, max_position_embeddings=64, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    )


def calibrated(model: Any, seed: int) -> Any:
    """The biased reward less what 1,000 responses of the untrained policy say about the length."""
    keys = [(seed, 999, i) for i in range(1000)]
    ids = [r.tolist() for r in responses(model.eval(), [torch.ones(1).long()] * 1000, keys, Sampling(LENGTH, 1.0, 0, (2,)), 250)]
    scores, tokens = np.array(biased(ids)), np.array([len(i) for i in ids], float)
    return CalibratedFunction(biased, Calibrator(("tokens",), frac=0.3).fit(scores, {"tokens": tokens}))


def run(variant: str, seed: int) -> list[list[float]]:
    """Mean length and mean quality of the responses of each update."""
    model, module = model_of(seed), types.ModuleType("bench_reward")
    seen: list[list[float]] = []
    inner = {"length-biased": lambda: biased, "calibrated": lambda: calibrated(model, seed), "quality": lambda: quality}[variant]()

    def reward(completions: list[Any], completion_ids: list[list[int]]) -> list[float]:
        lengths, worth = [len(i) for i in completion_ids], quality(completion_ids)
        seen.append([sum(lengths) / len(lengths), sum(worth) / len(worth)])
        return [float(v) for v in inner(completions=completions, completion_ids=completion_ids)]

    module.reward = reward  # type: ignore[attr-defined]
    sys.modules["bench_reward"] = module
    knobs = {"response_tokens": LENGTH, "temperature": 1.0, "top_k": 0, "reward_clip": 0.0, "kl": 0.02, "ppo_epochs": 2}
    method = Ppo(Knobs(reward_function="bench_reward:reward", segmenter="token", **knobs))
    ids = torch.ones(BATCH, 1, dtype=torch.int32)
    rows = Rows(ids, torch.full_like(ids, IGNORE), torch.ones(BATCH, dtype=torch.long))
    train = Train(batch=BATCH, lr=3e-3, schedule="constant", warmup=0.0, record=False, save_every=10**6, epochs=float(UPDATES))
    fit(model, rows, method.settings(rows, train), techniques=[method], evals={}, folder=Path(tempfile.mkdtemp()), seed=seed)
    return seen


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cache = Cache("reward_hacking")
    found = {v: [cache([v, s], lambda v=v, s=s: run(v, s)) for s in SEEDS] for v in VARIANTS}
    last = {v: [[sum(u[i] for u in r[-3:]) / 3 for i in (0, 1)] for r in runs] for v, runs in found.items()}
    series = {v: [[sum(r[u][i] for r in runs) / len(runs) for i in (0, 1)] for u in range(UPDATES)] for v, runs in found.items()}
    save(
        "reward_hacking",
        claim="PPO against a length-biased reward grows long at the cost of quality; calibrated, it stays short and better",
        outcome="; ".join(f"{v}: {spread([r[0] for r in x])} tokens, quality {spread([r[1] for r in x])}" for v, x in last.items()),
        columns=["reward", "tokens at the start", "tokens at the end", "quality at the start", "quality at the end"],
        rows=[
            [v, *(spread([r[0][i] if at == 0 else e[i] for r, e in zip(runs, last[v], strict=True)]) for i in (0, 1) for at in (0, 1))]
            for v, runs in found.items()
        ],
        seeds=SEEDS,
        notes=[
            "the end: the mean of the last 3 updates; plain PPO, 64 responses and 2 passes an update, learning rate 3e-3, KL weight 0.02",
            "Prompt Bias Calibration takes out an offset of each prompt; with one prompt there is none, so it is not among the variants",
        ],
        plots=[
            {
                "kind": "panels",
                "title": "While it trains",
                "plots": [
                    {
                        "kind": "line",
                        "title": title,
                        "x": "update",
                        "y": "",
                        "series": {v: [[u + 1, s[u][i]] for u in range(UPDATES)] for v, s in series.items()},
                    }
                    for i, title in enumerate(("response tokens", "quality"))
                ],
            }
        ],
    )


if __name__ == "__main__":
    main()
