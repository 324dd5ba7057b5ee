"""What the suites of pairs share: a case is one reward model's scores and how its accuracies sum up."""

from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, did_you_mean
from modelwright.reward.table.evidence import Heads
from modelwright.reward.table.scores import COUNTS, Scores, Source, last

Case = tuple[Scores, Heads]
Texts = dict[tuple[str, str], dict[str, Any]]  # (subset or domain, id) -> chosen and rejected
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


def files(path: str | Path) -> list[tuple[str, Path]]:
    """The file, or every table in the folder, with its name: the path inside, less the endings."""
    path = Path(path)
    if not path.is_dir():
        return [(_stem(path.name), path)]
    found = [(_stem(str(f.relative_to(path))), f) for f in sorted(path.rglob("*")) if f.is_file() and f.name.endswith(_ENDINGS)]
    if not found:
        raise UserError(f"{path} holds no json, jsonl, csv or parquet file", how="check the path")
    return found


def _stem(name: str) -> str:
    return name.removesuffix(".gz").rpartition(".")[0] or name


def texts(path: str | None, part: str) -> Texts:
    """The suite's own data by (part, id); without a column `part`, a file's name up to the first "_" is it."""
    out: Texts = {}
    for name, file in files(path) if path else ():
        source = Source(file)
        ids, chosen, rejected = (source.get(k) for k in ("id", "chosen", "rejected"))
        parts = source.get(part) if source.has(part) else [Path(name).name.split("_")[0]] * len(ids)
        for p, i, a, b in zip(parts, ids, chosen, rejected, strict=True):
            key = str(p), str(i)
            if key in out:
                raise UserError(f"id {i} ({p}) stands twice in {path}", "its texts could be either", "drop one")
            out[key] = {"chosen": a, "rejected": b}
    return out


def text_of(known: Texts, key: tuple[str, str], file: Path) -> dict[str, Any]:
    """The chosen and rejected texts of a row of `file`."""
    if key not in known:
        raise UserError(f"id {key[1]} ({key[0]}) of {file} has no text", "the data given as texts has no such row")
    return known[key]


def counted(values: list[Any], feature: str, file: Path) -> np.ndarray:
    """A feature (n,) counted from texts."""
    if feature not in COUNTS:
        raise UserError(f"the feature '{feature}' cannot be counted from a text", how=did_you_mean(feature, COUNTS))
    return np.array([COUNTS[feature](last(v, file, i)) for i, v in enumerate(values)], np.float64)


def mean_of(heads: list[dict[str, float]]) -> dict[str, float]:
    """The plain mean of weighted means, as one weighted mean."""
    out: dict[str, float] = {}
    for head in heads:
        for part, weight in head.items():
            out[part] = out.get(part, 0.0) + weight / sum(head.values()) / len(heads)
    return out


def value_of(head: dict[str, float], shares: dict[str, float]) -> float:
    """The head's weighted mean, in percent, of the parts' shares."""
    return 100 * sum(w * shares[p] for p, w in head.items()) / sum(head.values())
