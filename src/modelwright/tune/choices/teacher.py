"""What a teacher makes of each row, computed once and kept on disk: states of the question, states and scores of the answers."""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.core.data.rows import TokenRows
from modelwright.core.data.store import cache_folder, publish, store_key
from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors, fingerprint_path
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist
from modelwright.tune.choices.scoring import ChoiceScores

_NAMES = ("x", "y", "scores")
_VERSION = 1  # of the files: raise it when the same input gives other states


@dataclass
class TaughtRows(TokenRows):
    """Rows with the teacher's states: x_taught (X, d), y_taught (tokens of all answers, d), scores_taught (C,)."""

    rows: TokenRows
    folder: Path
    first: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts, self.stops, self.bytes, self.width, self.packed = self.rows.facts, self.rows.stops, 0, self.rows.width, False
        self._open()

    def _open(self) -> None:
        told = json.loads((self.folder / "facts.json").read_text())
        self._ends = np.load(self.folder / "ends.npy")
        states = (np.memmap(self.folder / f"{n}.bin", told["type"], "r").reshape(-1, told["width"]) for n in ("x", "y"))
        self._data = dict(zip(_NAMES, (*states, np.memmap(self.folder / "scores.bin", np.float32, "r")), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_ends", "_data")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, at = self.rows[i], self.first + i
        begin = self._ends[at - 1] if at else np.zeros(3, np.int64)
        parts = {f"{n}_taught": self._data[n][begin[k] : self._ends[at][k]] for k, n in enumerate(_NAMES)}
        return row | {n: torch.from_numpy(np.array(v)).float() for n, v in parts.items()}

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    def split(self, at: int) -> tuple["TaughtRows", "TaughtRows"]:
        a, b = self.rows.split(at)
        return TaughtRows(a, self.folder, self.first), TaughtRows(b, self.folder, self.first + at)


def taught(rows: TokenRows, teacher: Checkpoint, tokenizer: Any, kind: str, batch: int) -> TaughtRows:
    """The rows with what the teacher makes of them, from the disk where it is there; `kind` is the type of the states, fp16 or fp32."""
    key = store_key(_VERSION, fingerprint_path(teacher.folder), _digest(rows), kind, len(rows))
    home = cache_folder().parent / "teachers"
    if dist.rank() == 0 and not (home / key / "facts.json").is_file():
        part = home / f"{key}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            with disk_errors(home):
                part.mkdir(parents=True)
                _write(part, rows, teacher, tokenizer, np.float16 if kind == "fp16" else np.float32, batch)
            publish(part, home / key)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    return TaughtRows(rows, home / key)


def _digest(rows: TokenRows) -> str:
    found = hashlib.sha256()
    for i in range(len(rows)):
        row = rows[i]
        for ids in (row["input_ids"], row["rationale"], *row["answers"]):
            found.update(len(ids).to_bytes(4, "little") + ids.numpy().tobytes())
    return found.hexdigest()


def _write(part: Path, rows: TokenRows, teacher: Checkpoint, tokenizer: Any, kind: Any, batch: int) -> None:
    model = teacher.model(torch.float32)
    model.to(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu").eval()
    ends = []
    with ExitStack() as stack:
        files = [stack.enter_context(open(part / f"{name}.bin", "wb")) for name in _NAMES]
        for states in _states(model, rows, tokenizer, batch):
            for file, name, value in zip(files, _NAMES, states, strict=True):
                value = value.astype(np.float32 if name == "scores" else kind)
                if not np.isfinite(value).all():
                    raise UserError("the teacher's states do not fit fp16", "one is above 65504 or not a number", "set states: fp32")
                file.write(value.tobytes())
            ends.append([len(v) for v in states])
            width = states[0].shape[1]
    np.save(part / "ends.npy", np.cumsum(np.asarray(ends, np.int64), 0))
    (part / "facts.json").write_text(json.dumps({"width": width, "type": np.dtype(kind).name}))


@torch.no_grad()
def _states(model: nn.Module, rows: TokenRows, tokenizer: Any, batch: int) -> Any:
    """For each row x (X, d), y (tokens, d), scores (C,)."""
    objective = ChoiceScores(model, tokenizer, rationale=True, bottleneck=True)
    objective.install(model)
    try:
        for i in range(0, len(rows), batch):
            b = objective.collate([rows[j] for j in range(i, min(len(rows), i + batch))])
            b = {k: v.to(next(model.parameters()).device) for k, v in b.items()}
            out = objective.forward(model, b, torch.ones_like(b["labels"][:, 1:], dtype=torch.float32))
            assert out.scores is not None and out.x_states is not None and out.y_states is not None
            for k in range(len(out.scores)):
                scores = out.scores[k]
                yield tuple(
                    _plain(v) for v in (out.x_states[k][b["x_real"][k]], out.y_states[k][b["targets"][k] >= 0], scores[scores > -1e30])
                )
    finally:
        objective.remove()


def _plain(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
