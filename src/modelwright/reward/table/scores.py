"""Recorded scores from a file: a row per pair, a row per response, or RewardBench's eval-set-scores; plain or gzipped.

`columns` maps a role to the column that plays it; a role not named there is played by the column of its own name.
A feature is a column (for pairs two: NAME_chosen and NAME_rejected, or chosen_NAME and rejected_NAME), or it is counted
from the text: length (characters), words, markdown (headers, list items and bold spans, by the three patterns of
Post-hoc Reward Calibration's code), tokens (with a tokenizer).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.data.tables import column, numbers, table
from modelwright.core.errors import UserError, did_you_mean

ROLES = ("scores_chosen", "scores_rejected", "text_chosen", "text_rejected", "score", "text", "group", "label", "id", "subset")
_HEADER, _ITEM = re.compile(r"^\s{0,3}#{1,6}\s+", re.MULTILINE), re.compile(r"^\s*[-+*] |\d+\.\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*(.*?)\*\*|__(.*?)__")


def markdown(text: str) -> int:
    """Headers, list items and bold spans in a text."""
    return sum(1 for pattern in (_HEADER, _ITEM, _BOLD) for _ in pattern.finditer(text))


LARGEST = 1e100  # of a score: sums and squares of as many as memory holds stay finite


def finite(values: list[Any], where: str) -> np.ndarray:
    """A column as float64. Raises UserError that names the first row which is no finite number, or too large to be summed."""
    for i, v in enumerate(values, 1):
        if isinstance(v, (int, float)) and abs(v) > LARGEST and abs(v) != float("inf"):
            raise UserError(f"row {i} of {where} is beyond 1e100", "numbers of that size cannot be summed", "fix or drop the row")
    return numbers(values, where)


def checked(name: str, values: Any, n: int) -> np.ndarray:
    """Values as float64 (n,). Raises UserError for another shape, and for the first one that is no finite number."""
    try:
        out = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"'{name}' holds something that is no number", how="give one number per response") from None
    if out.shape != (n,):
        raise UserError(f"'{name}' has shape {out.shape} for {n} scores", how="give one number per response")
    bad = np.flatnonzero(~(np.abs(out) <= LARGEST))
    if len(bad):
        raise UserError(f"row {bad[0] + 1} of '{name}' is {out[bad[0]]}", "a finite number below 1e100 is needed", "fix or drop the row")
    return out


COUNTS: dict[str, Callable[[str], int]] = {"length": len, "words": lambda text: len(text.split()), "markdown": markdown}


@dataclass(frozen=True)
class Scores:
    """Scored responses (n of them) and the comparisons (p) between responses of one group."""

    name: str
    score: np.ndarray  # (n,)
    features: dict[str, np.ndarray]  # each (n,)
    group: np.ndarray  # (n,) the prompt that a response answers, counted from 0
    better: np.ndarray  # (p,) index of the preferred response
    worse: np.ndarray  # (p,)
    part: np.ndarray  # (p,) the subset of a comparison, as an index into parts
    parts: list[str] = field(default_factory=lambda: ["all"])
    ids: dict[str, list[Any]] = field(default_factory=dict)  # columns that name a row, each of n values


def pairs(
    name: str, chosen: np.ndarray, rejected: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]], subset: list[str] | None = None
) -> Scores:
    """Scores of n pairs: all chosen responses first, then all rejected ones."""
    n = len(chosen)
    parts, part = np.unique(np.asarray(subset or ["all"] * n, dtype=str), return_inverse=True)
    both = {k: np.concatenate(v) for k, v in features.items()}
    return Scores(name, np.r_[chosen, rejected], both, np.tile(np.arange(n), 2), np.arange(n), np.arange(n, 2 * n), part, parts.tolist())


def ordered_pairs(group: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (better, worse) of all pairs within a group whose labels differ."""
    order = np.lexsort((label, group))
    _, first, size = np.unique(group[order], return_index=True, return_counts=True)
    better, worse = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for s in np.unique(size[size > 1]):
        rows = order[first[size == s][:, None] + np.arange(s)]  # (groups, s), labels rising
        low, high = (rows[:, i].ravel() for i in np.triu_indices(s, 1))
        differ = label[low] < label[high]
        better.append(high[differ])
        worse.append(low[differ])
    return np.concatenate(better), np.concatenate(worse)


class Source:
    """One file and its column map."""

    def __init__(self, path: Path, columns: dict[str, str] | None = None, tokenizer: str | None = None, roles: tuple[str, ...] = ROLES):
        self.path, self.map, self.tokenizer = path, columns or {}, tokenizer
        self.table = table(path)
        for role, name in self.map.items():
            if role not in roles and not role.endswith(("_chosen", "_rejected")):
                raise UserError(f"columns has an unknown role '{role}'", how=did_you_mean(role, roles))
            if name not in self.table[0]:
                raise UserError(f"{path} has no column '{name}'", f"columns names it for '{role}'", did_you_mean(name, self.table[0]))

    def has(self, role: str) -> bool:
        return self.map.get(role, role) in self.table[0]

    def get(self, role: str) -> list[Any]:
        return column(self.path, self.table, self.map.get(role, role))

    def numbers(self, role: str) -> np.ndarray:
        """A column as float64; [x] counts as x, true as 1."""
        values = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in self.get(role)]
        return finite([int(v) if isinstance(v, bool) else v for v in values], f"'{self.map.get(role, role)}' in {self.path}")

    def names(self, role: str) -> list[Any]:
        """A column of names: ids, groups, subsets. Raises UserError for a row without one."""
        values = self.get(role)
        for i, v in enumerate(values, 1):
            if v is None or v != v:
                raise UserError(f"row {i} of {self.path} has no {role}", "it would be compared with others that have none", "fill it in")
        return values

    def feature(self, name: str, side: str = "") -> np.ndarray:
        """A feature from its column, or counted from the text of that side ("", "chosen" or "rejected")."""
        for role in (f"{name}_{side}", f"{side}_{name}") if side else (name,):
            if self.has(role):
                return self.numbers(role)
        text = f"text_{side}" if side else "text"
        count = self._tokens() if name == "tokens" and self.tokenizer else COUNTS.get(name)
        wanted = f"'{name}_{side}'" if side else f"'{name}'"
        if count is None:
            how = "give a tokenizer" if name == "tokens" else "counted from texts are " + ", ".join(COUNTS) + " and tokens"
            raise UserError(f"{self.path} has no column {wanted} for the feature '{name}'", how=how)
        if not self.has(text):
            raise UserError(
                f"{self.path} has neither a column {wanted} nor '{text}' to count the feature '{name}' from", how="name one in columns"
            )
        return np.array([count(last(t, self.path, i)) for i, t in enumerate(self.get(text))], np.float64)

    def _tokens(self) -> Callable[[str], int]:
        from tokenizers import Tokenizer

        file = Path(self.tokenizer or "")
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}", how="give a tokenizer.json or the folder that holds one")
        encode = Tokenizer.from_file(str(file)).encode
        return lambda text: len(encode(text, add_special_tokens=False).ids)


def last(value: Any, path: Path, row: int) -> str:
    """A response as text; of a list of chat messages the last one's content."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise UserError(f"row {row + 1} of {path} has no text", f"it holds {str(value)[:40]!r}", "a string or a list of messages is needed")
    return value


def read(path: str | Path, features: list[str], columns: dict[str, str] | None = None, tokenizer: str | None = None) -> Scores:
    """The scores in a file. Raises UserError for whatever is missing, no number, one-sided or there twice."""
    source = Source(Path(path), columns, tokenizer)
    if source.has("scores_chosen") or source.has("scores_rejected"):
        return _read_pairs(source, features)
    if source.has("score"):
        return _read_responses(source, features)
    raise UserError(
        f"{path} has no scores",
        "it has neither 'scores_chosen' (a row per pair) nor 'score' (a row per response)",
        "name the columns: {score: NAME}",
    )


def _read_pairs(source: Source, features: list[str]) -> Scores:
    sides = [source.get("scores_chosen"), source.get("scores_rejected")]
    for i, (a, b) in enumerate(zip(*sides, strict=True)):
        if (a is None) != (b is None):
            raise UserError(f"row {i + 1} of {source.path} has a score for one side only", "a pair has two", "score both or drop the row")
    subset = [str(v) for v in source.names("subset")] if source.has("subset") else None
    found = pairs(
        source.path.name,
        source.numbers("scores_chosen"),
        source.numbers("scores_rejected"),
        {f: (source.feature(f, "chosen"), source.feature(f, "rejected")) for f in features},
        subset,
    )
    n = len(found.better)
    names = unique(source, "id", subset) if source.has("id") else list(range(n))
    found.ids.update(group=names * 2, label=[1] * n + [0] * n, **({"subset": subset * 2} if subset else {}))
    return found


def _read_responses(source: Source, features: list[str]) -> Scores:
    score = source.numbers("score")
    ids: dict[str, list[Any]] = {}
    subset = [str(v) for v in source.names("subset")] if source.has("subset") else None
    names = source.names("group") if source.has("group") else list(range(len(score)))
    code = {v: i for i, v in enumerate(dict.fromkeys(map(str, names)))}
    group = np.array([code[str(v)] for v in names])
    if source.has("id") and source.map.get("group") != source.map.get("id", "id"):
        ids["id"] = unique(source, "id", subset)
    better, worse = np.empty(0, np.int64), np.empty(0, np.int64)
    if source.has("group"):
        ids["group"] = names
        if source.has("label"):
            label = source.numbers("label")
            ids["label"] = label.tolist()
            if len(alone := np.flatnonzero(np.bincount(group) == 1)):
                raise UserError(f"group {list(code)[alone[0]]!r} of {source.path} has one response only", "a comparison needs two")
            better, worse = ordered_pairs(group, label)
    if subset:
        ids["subset"] = subset
    parts, part = np.unique(np.asarray(subset or ["all"] * len(score), dtype=str)[better], return_inverse=True)
    found = {f: source.feature(f) for f in features}
    return Scores(source.path.name, score, found, group, better, worse, part, parts.tolist(), ids)


def unique(source: Source, role: str, part: list[str] | None = None) -> list[Any]:
    """The names in a column. Raises UserError for one that stands twice, within its part where there are parts."""
    values = source.names(role)
    seen: set[tuple[str, str]] = set()
    for value, key in zip(values, zip(map(str, values), part or [""] * len(values), strict=True), strict=True):
        if key in seen:
            raise UserError(
                f"{role} {value!r} stands twice in {source.path}",
                "a row must be told from the others",
                "drop one, or name the prompt's column: {group: id}",
            )
        seen.add(key)
    return values
