"""Recorded runs as arrays: which examples were in each interval between two evaluations, and what each test example's loss was."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.data.tables import records
from modelwright.core.errors import UserError


@dataclass
class Runs:
    """seen (R, T, N): how often example n was in the batches of interval t; phi (R, T + 1, M): losses of the tests; lr (R, T)."""

    seen: np.ndarray
    phi: np.ndarray
    lr: np.ndarray
    examples: list[int]
    tests: list[str]
    steps: list[int]
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.phi)

    def take(self, which: Any) -> "Runs":
        """These runs."""
        return Runs(self.seen[which], self.phi[which], self.lr[which], self.examples, self.tests, self.steps, self.facts)

    def only(self, tests: Any) -> "Runs":
        """These tests."""
        return Runs(self.seen, self.phi[..., tests], self.lr, self.examples, [self.tests[int(i)] for i in tests], self.steps, self.facts)

    @property
    def batch(self) -> float:
        """Examples in an interval, on average."""
        return float(self.seen.sum(-1).mean())


def found_files(paths: list[str]) -> list[Path]:
    """The recordings that paths name: files, or folders searched for dynamics.parquet."""
    files: list[Path] = []
    for p in map(Path, paths):
        inside = sorted(p.rglob("dynamics*.parquet")) if p.is_dir() else [p]
        if not inside or not inside[0].is_file():
            raise UserError(f"no recorded run at {p}", "tuning writes dynamics.parquet while train.record is true", "check the path")
        files += inside
    return files


def read_runs(files: list[Path]) -> Runs:
    """Runs over the same data with the same tests. Raises UserError where runs cannot be compared; unlogged steps are joined and said."""
    raw = [_read(f) for f in files]
    tests = sorted(raw[0]["phi"])
    common = set.intersection(*(set(r["steps"]) for r in raw))
    for f, r in zip(files, raw, strict=True):
        if sorted(r["phi"]) != tests:
            odd = sorted(set(r["phi"]) ^ set(tests))[0]
            raise UserError(f"{f} has other tests than {files[0]}", f"'{odd}' is in one of them only", "give runs with the same evals")
    steps = sorted(common)
    if len(steps) < 3:
        raise UserError(f"the runs share {len(steps)} evaluated steps", "three are the least", "set train.eval_every: 1 and record again")
    examples = sorted({e for r in raw for _, e, _ in r["train"]})
    column = {e: i for i, e in enumerate(examples)}
    seen = np.zeros((len(raw), len(steps) - 1, len(examples)))
    lr = np.zeros((len(raw), len(steps) - 1))
    count = np.zeros_like(lr)
    for k, r in enumerate(raw):
        for step, example, rate in r["train"]:
            t = int(np.searchsorted(steps, step)) - 1
            if 0 <= t < len(steps) - 1:
                seen[k, t, column[example]] += 1
                lr[k, t] += rate
                count[k, t] += 1
    if not count.all():
        raise UserError("an interval between two evaluations has no recorded batch", "its examples are unknown", "record every step")
    phi = np.array([[[r["phi"][n][s] for n in tests] for s in steps] for r in raw])
    gaps = sorted(set(np.diff(steps).tolist()))
    facts = {
        "runs": len(raw),
        "training examples": len(examples),
        "tests": len(tests),
        "evaluated steps": len(steps),
        "training steps between evaluations": f"{gaps[0]} to {gaps[-1]}" if len(gaps) > 1 else gaps[0],
        "evaluated steps that not all runs share": sum(len(set(r["steps"]) - common) for r in raw),
    }
    return Runs(seen, phi, lr / count, examples, tests, steps, facts)


def _read(file: Path) -> dict[str, Any]:
    from modelwright.core.train.recorder import read_dynamics

    try:
        rows = read_dynamics(file, ["step", "kind", "name", "example", "loss", "lr"]).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read", str(error).splitlines()[0], "give a dynamics.parquet of a tuning run") from None
    phi: dict[str, dict[int, float]] = {}
    train = []
    for r in rows:
        if r["kind"] == "eval":
            phi.setdefault(r["name"], {})[r["step"]] = r["loss"]
        elif r["kind"] == "train":
            train.append((r["step"], r["example"], r["lr"]))
    if not phi or not train:
        what = "evaluations" if not phi else "training examples"
        raise UserError(f"{file} holds no {what}", "both are needed", "give evals, and leave train.record true")
    steps = set.intersection(*(set(v) for v in phi.values()))
    return {"phi": phi, "train": train, "steps": sorted(steps)}


# ---- texts ---------------------------------------------------------------------------------------------------------------
def texts_of(path: str, examples: list[int]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the data that was trained on, and a text for each example that was seen: example i is row i."""
    rows = list(records(Path(path)))
    if examples and max(examples) >= len(rows):
        raise UserError(
            f"example {max(examples)} was trained on and {path} has {len(rows)} rows",
            "example i must be row i",
            "give the data of the runs",
        )
    return rows, [text_of(rows[e]) for e in examples]


def text_of(row: dict[str, Any]) -> str:
    """What a row says: its messages, else its texts, one after the other."""
    messages = row.get("messages")
    if isinstance(messages, list):
        return "\n".join(str(m.get("content", "")) for m in messages)
    return "\n".join(v for v in row.values() if isinstance(v, str))


def tests_of(path: str, tests: list[str]) -> list[str]:
    """The text of each test, from a table with the columns name and text."""
    known = {str(r.get("name")): str(r.get("text", "")) for r in records(Path(path))}
    if absent := [t for t in tests if t not in known]:
        raise UserError(f"{path} has no text for '{absent[0]}'", "each recorded test needs one", "add a row with its name and text")
    return [known[t] for t in tests]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """One object a line."""
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
