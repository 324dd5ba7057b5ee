"""Does a student learn from its teacher's rationales? A made task of few examples with right, shuffled and no rationales; StrategyQA."""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import modelwright
from common import SHARED, Cache, save
from modelwright.core.model.checkpoint import silence_transformers

KEYS, OTHERS = [f"key{i}" for i in range(12)], [f"word{i}" for i in range(30)]
ARMS = ("I->O", "teacher", "KNIFE", "KNIFE, shuffled rationales")


def questions(n: int, seed: int) -> list[dict[str, Any]]:
    """Seven words, one of which decides: half of the twelve keys mean yes. The rationale names the key."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        k, words = int(rng.integers(len(KEYS))), list(rng.choice(OTHERS, 6, replace=False))
        words.insert(int(rng.integers(7)), KEYS[k])
        rows.append({"question": " ".join(words), "answer": k % 2 == 0, "rationale": f"{KEYS[k]} decides"})
    return rows


def t5(folder: Path, texts: list[str], seed: int, vocab: int, size: int) -> None:
    """An untrained T5 with a tokenizer of its own."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(seed)
    shape = {"d_model": size, "d_kv": size // 4, "d_ff": 2 * size, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def shuffled(rows: list[dict[str, Any]], name: str, seed: int) -> list[dict[str, Any]]:
    order = np.random.default_rng(seed).permutation(len(rows))
    return [{**r, name: rows[j][name]} for r, j in zip(rows, order, strict=True)]


class Bench:
    """The arms on one set of questions."""

    def __init__(
        self, folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], name: str, seed: int, settings: dict[str, Any]
    ):
        self.folder, self.name, self.seed, self.settings = folder, name, seed, settings
        self.train = {k: write(folder / f"{k}.jsonl", rows) for k, rows in (("right", train), ("shuffled", shuffled(train, name, seed)))}
        self.test = write(folder / "test.jsonl", test)

    def run(self, to: str, base: Path, way: str, data: str = "right", **knobs: Any) -> float:
        """Accuracy on the test questions, %; a teacher reads their rationales."""
        done = modelwright.run(
            "tune.knife",
            base=base,
            to=self.folder / to,
            seed=self.seed,
            data=self.train[data],
            evals={"test": {"path": self.test}},
            rationale=self.name,
            way=way,
            train={"record": False, "eval_every": 10**6, **self.settings},
            save={"certificate": "structure"},
            **knobs,
        )
        return 100 * float(done.steps[0]["evals"][-1]["accuracy"])

    def arms(self) -> dict[str, float]:
        base, found = self.folder / "base", {}
        found["I->O"] = self.run("io", base, "i_o")
        found["teacher"] = self.run("teacher", base, "teacher")
        student: dict[str, Any] = {"way": "student", "student": str(base)}
        found["KNIFE"] = self.run("knife", self.folder / "teacher", **student)
        self.run("teacher2", base, "teacher", "shuffled")
        found["KNIFE, shuffled rationales"] = self.run("knife2", self.folder / "teacher2", data="shuffled", **student)
        return found


def made(n: int, epochs: float, seed: int) -> dict[str, float]:
    train, test = questions(n, 100 + seed), questions(300, 900 + seed)
    with tempfile.TemporaryDirectory() as tmp:
        t5(Path(tmp) / "base", [" ".join([*KEYS, *OTHERS, "decides yes no"])] * 20, seed, 400, 32)
        settings = {"epochs": epochs, "lr": 3e-3, "batch": 16, "context": 48}
        return Bench(Path(tmp), train, test, "rationale", seed, settings).arms()


def strategyqa(seed: int) -> dict[str, float]:
    train, test = (json.loads((SHARED / "strategyqa" / f"{part}.json").read_text()) for part in ("train", "dev"))
    with tempfile.TemporaryDirectory() as tmp:
        t5(Path(tmp) / "base", [r["question"] for r in train] + [f for r in train for f in r["facts"]], seed, 2000, 32)
        settings = {"epochs": 1, "lr": 2e-3, "batch": 32, "context": 96}
        return Bench(Path(tmp), train, test, "facts", seed, settings).arms()


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--n", type=int, default=80)
    args.add_argument("--epochs", type=float, default=30)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    cache, seeds = Cache("knife"), range(a.seeds)
    tables = {
        f"made, {a.n} questions": [cache(["made", s, a.n, a.epochs], lambda s=s: made(a.n, a.epochs, s)) for s in seeds],
        "StrategyQA": [cache(["strategyqa", s], lambda s=s: strategyqa(s)) for s in seeds],
    }
    mean = {t: {arm: statistics.mean(r[arm] for r in found) for arm in ARMS} for t, found in tables.items()}
    first, real = mean.values()
    gain, lost = first["KNIFE"] - first["I->O"], first["KNIFE, shuffled rationales"] - first["I->O"]
    save(
        "knife",
        claim="A student taught through the bottleneck beats fine-tuning on few questions; shuffled rationales end that (2212.09721)",
        outcome=f"Made task: KNIFE {gain:+.1f} points on I->O, with shuffled rationales {lost:+.1f}; the teacher, which reads them, "
        f"{first['teacher']:.1f} %. StrategyQA with an untrained T5 of this size: {real['KNIFE']:.1f} % against {real['I->O']:.1f} %.",
        columns=["questions", "arm", "accuracy, %", "by seed"],
        rows=[
            [t, arm, f"{mean[t][arm]:.1f} ± {statistics.stdev(r[arm] for r in found):.1f}", ", ".join(f"{r[arm]:.1f}" for r in found)]
            for t, found in tables.items()
            for arm in ARMS
        ],
        seeds=list(seeds),
        notes=[
            "T5 of 2 + 2 layers, untrained before; the same steps for every arm, the student's after its teacher's",
            "the teacher reads the rationales of the test questions; every other arm sees questions alone",
        ],
    )


if __name__ == "__main__":
    main()
