"""Peak memory and time of one step over a large vocabulary: chunks of tokens beside all logits at once.

python bench/loss_memory.py               # all
python bench/loss_memory.py ARM VOCAB     # one measurement, in a process of its own
"""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from common import save

TOKENS, WIDTH = 4096, 256
ARMS = ("chunked", "whole logits", "transformers' own loss")


def step(arm: str, vocab: int) -> tuple[float, float, float]:
    """Peak memory above weights, gradients and states in MB, seconds of forward and backward pass, and the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelwright.core.data.rows import IGNORE
    from modelwright.core.train.objective import NextToken

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=TOKENS, tie_word_embeddings=True, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():  # weights, gradients and both moments are there before the step is measured
        p.grad = torch.zeros_like(p)
    optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.randint(0, vocab, (4, TOKENS // 4), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    weights = (batch["labels"][:, 1:] != IGNORE).float()
    objective = NextToken(model)
    objective.whole_logits = arm == "whole logits"
    objective.install(model)
    began = time.process_time()
    if arm == "transformers' own loss":
        objective.remove()
        total = model(**batch, use_cache=False).loss * weights.sum()
    else:
        total = objective.forward(model, batch, weights).total
    (total / weights.sum()).backward()
    seconds = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 / 1e6, seconds, float(total / weights.sum())


def main() -> None:
    rows = []
    for vocab in (32_000, 128_256, 262_144):
        found = {}
        for arm in ARMS:
            done = subprocess.run(
                [sys.executable, __file__, arm, str(vocab)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            found[arm] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        whole = found["whole logits"]
        for arm, one in found.items():
            if one is None:
                rows.append([vocab, arm, "ran out of memory", "", ""])
                continue
            ratio = f"{one[1] / whole[1]:.2f}" if whole else ""
            rows.append([vocab, arm, f"{one[0]:.0f}", ratio, f"{one[2]:.6f}"])
    ours = [r for r in rows if r[1] == "chunked" and r[0] > 100_000]
    save(
        "loss_memory",
        claim="A step of 4,096 tokens over 128,256 or 262,144 words: at most 1 GB above weights, gradients and states, at 1.05 x the time",
        outcome="; ".join(f"{v:,} words: {mb} MB at {t} x the time of whole logits" for v, _, mb, t, _ in ours) + ".",
        columns=["words", "loss", "peak above the model's own, MB", "of the time of whole logits", "loss, nats"],
        rows=rows,
        notes=[f"Llama of width {WIDTH}, one block, tied head, fp32, one thread, CPU time of both passes; gradients were there"],
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(step(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
