"""Mixture-of-Instructions on four real domains of unequal size: balanced chunks against random packing and isolated examples.

stories260K learns 12 snippets of code (CoNaLa in three languages), 24 tool calls, 48 answers of alpaca and 96 of gsm8k, each arm for the
same number of tokens. Measured on 16 held-out examples of each domain behind the default prompt: loss of the answers in nats a token.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import modelwright
from common import SHARED, Cache, save
from modelwright.core.model.checkpoint import silence_transformers

DEFAULT = "You are a helpful assistant."
SYSTEMS = {
    "code": "You are a programmer.",
    "tools": "You are an assistant who calls tools.",
    "talk": DEFAULT,
    "math": "You are a mathematician.",
}
SIZES = {"code": 12, "tools": 24, "talk": 48, "math": 96}
ONE = dict.fromkeys(SYSTEMS, DEFAULT)
ARMS: dict[str, dict[str, Any]] = {
    "MoI: balanced, chunk mask": {},
    "balanced, isolated": {"attention": "example"},
    "balanced, all seen": {"attention": "pack"},
    "random packing, all seen": {"sampling": "random", "attention": "pack", "loss": "token"},
    "random packing, isolated": {"sampling": "random", "attention": "example", "loss": "token"},
    "MoI with one prompt for all": {"systems": ONE},
}
CONTEXT, HELD = 448, 16


def pairs() -> dict[str, list[tuple[str, str]]]:
    """Question and answer of each domain, short enough that four fit a row."""
    data = SHARED / "llamafactory"
    lines = gzip.decompress((SHARED / "gsm8k" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    calls = [c["conversations"] for c in json.loads((data / "glaive_toolcall_en_demo.json").read_text())]
    found = {
        "math": [(r["question"], r["answer"]) for r in map(json.loads, lines)],
        "talk": [(r["instruction"], r["output"]) for r in json.loads((data / "alpaca_en_demo.json").read_text()) if not r["input"]],
        "code": [(r["rewritten_intent"] or r["intent"], r["snippet"]) for r in json.loads((SHARED / "mconala" / "train.json").read_text())],
        "tools": [
            (c[i - 1]["value"], m["value"])
            for c in calls
            for i, m in enumerate(c)
            if m["from"] == "function_call" and c[i - 1]["from"] == "human"
        ],
    }
    return {d: [(q, a) for q, a in rows if len(a) > 2 and len(q) + len(a) < 260] for d, rows in found.items()}


def files(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The training file, and one held-out file a domain."""
    rows, held = [], {}
    for domain, found in pairs().items():
        assert len(found) >= SIZES[domain] + HELD, (domain, len(found))
        chats = [{"domain": domain, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in found]
        held[domain] = folder / f"{domain}.jsonl"
        held[domain].write_text("".join(json.dumps(r) + "\n" for r in chats[:HELD]))
        rows += chats[HELD : HELD + SIZES[domain]]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "train.jsonl", held


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--tokens", type=int, default=20_000)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache = Cache("moi")

    def once(arm: str, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as tmp:
            train, held = files(Path(tmp))
            done = modelwright.run(
                "tune.moi",
                base=SHARED / "stories260K" / "hf",
                to=Path(tmp) / "out",
                seed=seed,
                data={"path": str(train), "column": "messages", "chat_template": "turns"},
                evals={d: {"path": str(f), "column": "messages", "chat_template": "turns"} for d, f in held.items()},
                train={"tokens": a.tokens, "lr": a.lr, "batch": 4, "context": CONTEXT, "eval_every": 10**6, "record": False},
                save={"certificate": "structure"},
                **{"systems": SYSTEMS, "default": DEFAULT, **ARMS[arm]},
            )
            ends = {e["name"]: e["loss"] for e in done.steps[0]["evals"]}
            return {d: ends[d] for d in SYSTEMS}

    found = {arm: [cache([arm, s, a.tokens, a.lr], lambda arm=arm, s=s: once(arm, s)) for s in range(a.seeds)] for arm in ARMS}
    rows = []
    worst = {arm: [max(r.values()) for r in runs] for arm, runs in found.items()}
    mean = {arm: [statistics.mean(r.values()) for r in runs] for arm, runs in found.items()}

    def show(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    for arm, runs in found.items():
        rows.append([arm, *(show([r[d] for r in runs]) for d in SYSTEMS), show(mean[arm]), show(worst[arm])])
    gaps = {
        arm: show([x - y for x, y in zip(worst["MoI: balanced, chunk mask"], worst[arm], strict=True)])
        for arm in ARMS
        if arm != "MoI: balanced, chunk mask"
    }
    save(
        "moi",
        claim="Balanced chunks with a mask between them lower the loss of the worst domain against random packing and isolated examples "
        "(2404.18410)",
        outcome=f"Worst-domain loss of MoI less that of the others, seed by seed: {'; '.join(f'{arm}: {g}' for arm, g in gaps.items())}.",
        columns=["arm", *(f"{d} ({SIZES[d]})" for d in SYSTEMS), "mean", "worst domain"],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=[
            f"stories260K, {a.tokens:,} tokens for every arm, context {CONTEXT}, lr {a.lr:g}; nats a token of the answers",
            "in brackets the examples of a domain; all are measured behind the default prompt; ± is the standard deviation over seeds",
        ],
    )


if __name__ == "__main__":
    main()
