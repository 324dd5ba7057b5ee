"""Small rewards and small data to try alignment with, from start to end, on a processor. They say nothing about quality.

    python -m modelwright.rl.rollout.examples align      # writes align/sft.jsonl, align/pairs.jsonl, align/prompts.jsonl

The task is to say some words again and stop. What a model is first taught is right half of the time and goes on too long the other half;
pairs prefer the right answer; `again` tells which answers are right.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

WORDS = "file name list string value key line class object module import return read write open close type code text path".split()


def letters(completions: list[Any]) -> list[float]:
    """The share of a response's characters that are letters; of responses that are token ids, the share of even ones."""
    return [_share([c.isalpha() for c in r] if isinstance(r, str) else [i % 2 == 0 for i in r]) for r in completions]


def length(completion_ids: list[list[int]]) -> list[float]:
    """Tokens of a response, in hundreds: the bias that many reward models have."""
    return [len(ids) / 100 for ids in completion_ids]


def again(prompts: list[str], completions: list[str]) -> list[float]:
    """1 where the words of the prompt are said again and nothing else, less by each word that is missing or too much."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, said = prompt.partition("Say ")[2].partition(":")[0].split(), re.findall(r"\w+", completion)
        right = sum(a == b for a, b in zip(asked, said, strict=False))
        found.append((right - max(0, len(said) - len(asked))) / max(1, len(asked)))
    return found


def _share(of: list[bool]) -> float:
    return sum(of) / max(1, len(of))


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts, each with a right answer and one that goes on too long."""
    draw = random.Random(seed)  # noqa: S311 - examples, no secrets
    found = []
    for _ in range(count):
        words = " ".join(draw.sample(WORDS, 2))
        found.append({"prompt": f"Say {words}:", "chosen": f" {words}.", "rejected": f" {words} {words} {words} {words}."})
    return found


def write(folder: Path, count: int = 600) -> None:
    """The three files of the recipes align and align-dpo."""
    folder.mkdir(parents=True, exist_ok=True)
    taught = [{"prompt": r["prompt"], "completion": r[("chosen", "rejected")[i % 2]]} for i, r in enumerate(rows(count, 0))]
    files = {"sft": taught, "pairs": rows(count, 1), "prompts": [{"prompt": r["prompt"]} for r in rows(count, 2)]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "align"))
