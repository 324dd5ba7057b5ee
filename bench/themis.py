"""Rewards with executed tools against a scalar reward, on made questions about dates and sums.

Questions ask for the day of the week of a date, and for the product of two numbers; the bad answer is another day or another number. The
seedling is trained on the same pairs in two ways: reward.train sees question and answer, reward.themis_train the trace with the call of a
calendar or a calculator too. The reward of a new pair is read behind its trace, whose call is made anew; the call itself is the recorded
one, so that what is measured is the judgement of a reward that has the tool's word, and not whether so small a model can copy a date.
"""

import argparse
import json
import random
import statistics
import tempfile
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch

import modelwright
from common import Cache, save
from modelwright.core.model.checkpoint import silence_transformers
from modelwright.models.reward import RewardFunction
from modelwright.reward.tools.builtin import toolbox
from modelwright.reward.tools.encode import encode
from modelwright.reward.tools.judge import ToolReward
from modelwright.reward.tools.replay import read_pairs

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KINDS = ("calendar", "calculator")


def row(kind: str, rng: random.Random, number: int) -> dict[str, Any]:
    if kind == "calendar":
        day = date(1990, 1, 1) + timedelta(days=rng.randrange(12_000))
        right = DAYS[day.weekday()]
        wrong = rng.choice([d for d in DAYS if d != right])
        question, call, given = f"Which day is {day}?", "Calendar.week_day", f"{day}"
    else:
        a, b = rng.randrange(12, 99), rng.randrange(12, 99)
        right, wrong = str(a * b), str(a * b + rng.choice([-1, 1]) * rng.choice([1, 2, 10, 20, 100]))
        question, call, given = f"What is {a} * {b}?", "calculator", f"{a} * {b}"
    seen = toolbox().observe(call, given)
    trace = {"Thought": "A tool knows.", "Action": call, "Action Input": given, "Observation": seen}
    both = {
        name: {"answer": said, "actions": trace, "score_agent": {"explanation": f"It is {seen}, and the answer says {said}."}}
        for name, said in (("pos_answer", right), ("neg_answer", wrong))
    }
    return {"id": f"{kind}_{number}", "question": question, **both}


def write(file: Path, n: int, seed: int) -> str:
    rng = random.Random(seed)
    file.write_text("".join(json.dumps(row(KINDS[i % 2], rng, i)) + "\n" for i in range(n)))
    return str(file)


def scalar(train: str, test: str, folder: Path, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Accuracy of a reward that sees question and answer alone."""
    pairs = folder / "pairs.jsonl"
    with pairs.open("w") as out:
        for p in read_pairs(Path(train)):
            both = {"chosen": f" {p.chosen.answer}", "rejected": f" {p.rejected.answer}"}
            out.write(json.dumps({"prompt": f"Question: {p.question}\nAnswer:", **both}) + "\n")
    done = modelwright.run("reward.train", base="seedling", to=folder / "scalar", data=str(pairs), seed=seed, **settings)
    reward, found = RewardFunction(done.to, batch=32), {}
    for kind in KINDS:
        asked = [p for p in read_pairs(Path(test)) if p.id.startswith(kind)]
        prompts = [f"Question: {p.question}\nAnswer:" for p in asked]
        good, bad = (reward(prompts, [f" {getattr(p, n).answer}" for p in asked]) for n in ("chosen", "rejected"))
        found[kind] = 100 * sum(g > b for g, b in zip(good, bad, strict=True)) / len(asked)
    return found


def with_tools(train: str, test: str, folder: Path, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Accuracy of a reward behind a trace whose call was made anew; its rationale repeats what the tool and the answer say."""
    done = modelwright.run("reward.themis_train", base="seedling", to=folder / "themis", data=train, seed=seed, **settings)
    reward, found = ToolReward(done.to, toolbox()), {}
    for kind in KINDS:
        asked, right = [p for p in read_pairs(Path(test)) if p.id.startswith(kind)], 0
        for p in asked:
            scores = []
            for j in (p.chosen, p.rejected):
                ids, _ = encode(reward.tokenizer, p, j, {"prompt": 0, "tool": 0, "observation": 0, "rationale": 0})
                scores.append(reward.score(ids))
            right += scores[0] > scores[1]
        found[kind] = 100 * right / len(asked)
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--pairs", type=int, default=160)
    args.add_argument("--epochs", type=float, default=4)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("themis")

    def once(arm: str, seed: int) -> dict[str, float]:
        train = {"epochs": a.epochs, "batch": 16, "lr": a.lr, "context": 256, "record": False, "save_every": 10**6, "eval_every": 10**6}
        settings = {"train": train, "save": {"certificate": "structure"}, "holdout": 0.0}
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            files = write(folder / "train.jsonl", a.pairs, seed), write(folder / "test.jsonl", 200, seed + 1000)
            return {"scalar": scalar, "tools": with_tools}[arm](*files, folder, seed, settings)

    found = {
        arm: [cache([arm, s, a.pairs, a.epochs, a.lr], lambda arm=arm, s=s: once(arm, s)) for s in range(a.seeds)]
        for arm in ("scalar", "tools")
    }
    mean = {arm: {k: statistics.mean(r[k] for r in runs) for k in KINDS} for arm, runs in found.items()}
    save(
        "themis",
        claim="A reward that reads what tools say ranks answers that a scalar reward cannot check (2310.01045)",
        outcome="; ".join(
            f"{k}: {mean['tools'][k]:.1f} % of new pairs ranked right with the tool, {mean['scalar'][k]:.1f} % without" for k in KINDS
        ),
        columns=["reward", *(f"{k}, % right" for k in KINDS), "by seed"],
        rows=[
            [
                arm,
                *(f"{mean[arm][k]:.1f} ± {statistics.pstdev(r[k] for r in runs):.1f}" for k in KINDS),
                "; ".join(", ".join(f"{r[k]:.0f}" for k in KINDS) for r in runs),
            ]
            for arm, runs in found.items()
        ],
        seeds=list(range(a.seeds)),
        notes=[
            f"the seedling, {a.pairs} pairs, {a.epochs:g} passes, 200 new pairs; calls are recorded ones made anew, rationales are given"
        ],
    )


if __name__ == "__main__":
    main()
