"""C-RLFT's ablation on two synthetic sources, clean and noisy 1 : 10.

The seedling learns to answer a word of four letters with each letter moved one on in the alphabet. The expert always does; the
sub-optimal source moves 70 % of its words two on. Measured: exact answers to new words under the expert's condition. Arms as in the
paper: full, no weight, no condition, plain SFT on all, the expert alone, the sub-optimal source alone.
"""

import argparse
import json
import random
import statistics
import string
import tempfile
from pathlib import Path

import torch

import modelwright
from common import Cache, save
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers

ARMS = {
    "full": {},
    "no weight": {"weights": {"expert": 1.0, "sub": 1.0}},
    "no condition": {"conditions": {"expert": "", "sub": ""}},
    "SFT on all": {"weights": {"expert": 1.0, "sub": 1.0}, "conditions": {"expert": "", "sub": ""}},
    "expert alone": {"weights": {"expert": 1.0, "sub": 0.0}},
    "sub-optimal alone": {"weights": {"expert": 0.0, "sub": 1.0}},
}
LETTERS = string.ascii_lowercase


def moved(word: str, by: int) -> str:
    return " ".join(LETTERS[(LETTERS.index(c) + by) % 26] for c in word)


def chats(expert: int, seed: int) -> tuple[list[dict], list[str]]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, k=4)) for _ in range(11 * expert + 200)]
    rows = []
    for i, word in enumerate(words[200:]):
        source = "expert" if i < expert else "sub"
        answer = moved(word, 2 if source == "sub" and rng.random() < 0.7 else 1)
        rows.append({"source": source, "messages": [{"role": "user", "content": " ".join(word)}, {"role": "assistant", "content": answer}]})
    rng.shuffle(rows)
    return rows, words[:200]


@torch.no_grad()
def accuracy(folder: Path, words: list[str]) -> float:
    made = Checkpoint(folder)
    model, tokenizer = made.model(torch.float32).eval(), made.tokenizer()
    asked = [[{"role": "user", "content": " ".join(w)}] for w in words]
    ids = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
    right, by_length = 0, {}
    for w, i in zip(words, ids, strict=True):
        by_length.setdefault(len(i), []).append((w, i))
    for group in by_length.values():
        out = model.generate(torch.tensor([i for _, i in group]), max_new_tokens=10, do_sample=False, pad_token_id=0)
        for (w, i), o in zip(group, out, strict=True):
            said = tokenizer.decode(o[len(i) :], skip_special_tokens=False).split("<|end_of_turn|>")[0]
            right += said.strip() == moved(w, 1)
    return 100 * right / len(words)


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--expert", type=int, default=200)
    args.add_argument("--epochs", type=float, default=6)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("c_rlft")

    def once(arm: str, seed: int) -> float:
        rows, words = chats(a.expert, seed)
        with tempfile.TemporaryDirectory() as tmp:
            data = Path(tmp) / "chats.jsonl"
            data.write_text("".join(json.dumps(r) + "\n" for r in rows))
            share = sum(r["source"] == "expert" for r in rows) / len(rows)
            # the same number of updates for every arm: one source alone is seen more often
            epochs = a.epochs / (share if arm == "expert alone" else 1 - share if arm == "sub-optimal alone" else 1)
            common = {"weights": {"expert": 1.0, "sub": 0.1}, "conditions": {"expert": "GPT4", "sub": "GPT3"}}
            train = {"epochs": epochs, "lr": a.lr, "batch": 4, "context": 256, "record": False}
            done = modelwright.run(
                "tune.c_rlft", base="seedling", to=Path(tmp) / "out", seed=seed, data=str(data), train=train, **(common | ARMS[arm])
            )
            return accuracy(done.to, words)

    found = {arm: [cache([arm, s, a.expert, a.epochs, a.lr], lambda arm=arm, s=s: once(arm, s)) for s in range(a.seeds)] for arm in ARMS}
    mean = {arm: statistics.mean(v) for arm, v in found.items()}
    order = " > ".join(sorted(mean, key=lambda k: -mean[k]))
    holds = mean["full"] > mean["no weight"] > mean["no condition"]
    save(
        "c_rlft",
        claim="Full C-RLFT beats it without weights, which beats it without conditions (2309.11235, ablation)",
        outcome=f"Accuracy order: {order}. The paper's order full > no weight > no condition {'holds' if holds else 'does not hold'} here.",
        columns=["arm", "exact answers under the expert's condition, %", "by seed"],
        rows=[[arm, f"{mean[arm]:.1f} ± {statistics.stdev(v):.1f}", ", ".join(f"{x:.1f}" for x in v)] for arm, v in found.items()],
        seeds=list(range(a.seeds)),
        notes=[
            f"{a.expert} expert and {10 * a.expert} other chats, {a.epochs:g} passes, as many updates for single sources; 200 new words"
        ],
    )


if __name__ == "__main__":
    main()
