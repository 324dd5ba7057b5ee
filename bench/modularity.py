"""Neurons that carry a function: disturbing them against as many random ones, and functional experts against random groups,
on the seedling and made examples of three functions."""

import json
import random
import statistics
import tempfile
from pathlib import Path

import torch

import modelwright
from common import save, spread

SEEDS = [0, 1, 2]
WORDS = "the file object is read and then a string value returned when list of items was given in call to function name with type".split()


def examples(seed: int, n: int = 40) -> list[dict]:
    r = random.Random(seed)

    def prose() -> str:
        return " ".join(r.choice(WORDS) for _ in range(12))

    def code() -> str:
        a, b, c = (r.choice(WORDS) for _ in range(3))
        return f"def {a}(self, {b}):\n    return self.{c}[{r.randrange(99)}]"

    def numbers() -> str:
        return "[" + ", ".join(str(r.randrange(999)) for _ in range(10)) + "]"

    made = {"code": code, "numbers": numbers, "capitals": lambda: prose().upper()}
    return [{"function": f, "text": make(), "label": y} for f, own in made.items() for y, make in ((1, own), (0, prose)) for _ in range(n)]


def main() -> None:
    torch.set_num_threads(1)
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "examples.jsonl"
            path.write_text("".join(json.dumps(x) + "\n" for x in examples(seed)))
            knobs = {"examples": str(path), "experts": 8, "top": 0.1, "disturb": [0.02], "partitions": 100}
            runs.append(modelwright.run("inspect.modularity", base="seedling", seed=seed, **knobs).steps[0]["metrics"])
    rows, worse, more = [], 0, 0
    for f in runs[0]["functions"]:
        best = [r["perturbation"][f]["rise"]["0.02"]["best"] for r in runs]
        other = [r["perturbation"][f]["rise"]["0.02"]["random"] for r in runs]
        layers = [list(r["functions"][f]["layers"].values()) for r in runs]
        own, chance = ([100 * statistics.mean(x[k] for x in part) for part in layers] for k in ("share", "random_share"))
        worse += sum(a > b for a, b in zip(best, other, strict=True))
        more += sum(a > b for a, b in zip(own, chance, strict=True))
        rows.append([f, spread(best), spread(other), spread(own), spread(chance)])
    n = len(SEEDS) * len(rows)
    save(
        "modularity",
        claim="Disturbing the 2 % of neurons that best tell a function apart raises the loss on its texts more than as many random neurons "
        "in the same layers; k-means groups are functional experts more often than random groups.",
        outcome=f"The best neurons cost more in {worse} of {n} cases; k-means groups are functional more often in {more} of {n}.",
        columns=["function", "rise, best neurons", "rise, random neurons", "functional experts, %", "of random groups, %"],
        rows=rows,
        seeds=SEEDS,
        notes=["the seedling (4 layers of 344 neurons), 40 made examples per label, 8 groups per layer, best 10 % of the neurons; nats"],
    )


if __name__ == "__main__":
    main()
