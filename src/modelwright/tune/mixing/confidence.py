"""How well each example is learnt: from a recorded run, or from a reference run that is made here."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.core.data.rows import PaddedDataset, TokenRows
from modelwright.core.data.store import cache_folder, store_key
from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors
from modelwright.core.knobs import Train, plain
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist, precision
from modelwright.core.train.loop import fit, steps_for
from modelwright.core.train.objective import NextToken
from modelwright.core.train.recorder import read_dynamics
from modelwright.tune.mixing.pairs import Example


def dynamics_of(path: Path) -> Path:
    """The file of a recorded run: itself, or the last of a result folder."""
    files = sorted(path.glob("steps/*/dynamics.parquet")) if path.is_dir() else [path]
    if not files or not files[-1].is_file():
        raise UserError(f"{path} holds no recorded run", "a dynamics.parquet is needed", "train once with train.record: true")
    return files[-1]


def recorded(file: Path, examples: list[Example]) -> np.ndarray:
    """Confidence of each example from the losses it had in a recorded run. UserError where that run saw other rows."""
    try:
        table = read_dynamics(file, ["kind", "example", "loss", "tokens"]).to_pydict()
    except (OSError, ValueError, KeyError):
        raise UserError(f"{file} is no record of a run", "it does not read as one", "give a dynamics.parquet") from None
    seen: dict[int, list[float]] = {}
    size: dict[int, int] = {}
    for kind, example, loss, tokens in zip(*table.values(), strict=True):
        if kind == "train":
            seen.setdefault(example, []).append(loss)
            size[example] = tokens
    why = "it was made on other rows"
    how = "record a run with the same data, context, packing and holdout"
    if missing := [e.id for e in examples if e.id not in seen]:
        raise UserError(f"{file} has no loss for {len(missing)} of {len(examples)} examples, the first is {missing[0]}", why, how)
    if other := [e for e in examples if size[e.id] != e.learnt]:
        e = other[0]
        raise UserError(f"{file} has {size[e.id]} learnt tokens for example {e.id}, which has {e.learnt} here", why, how)
    confidence = np.asarray([-np.mean(np.exp(np.asarray(seen[e.id], np.float64))) for e in examples])
    if not np.isfinite(confidence).all():
        raise UserError(f"{file} holds a loss that is not finite", "no confidence follows from it", "record a run that does not diverge")
    return confidence


@torch.no_grad()
def mean_losses(model: Any, objective: NextToken, rows: TokenRows, examples: list[Example], batch: int) -> np.ndarray:
    """Mean loss of the learnt tokens of each example, (E,)."""
    training, full, of = model.training, PaddedDataset(rows, batch), np.zeros(len(examples))
    by_row: dict[int, list[int]] = {}
    for k, e in enumerate(examples):
        by_row.setdefault(e.row, []).append(k)
    model.eval()
    for i in range(0, len(full), batch):
        b = {k: v.to(model.device) for k, v in objective.collate([full[j] for j in range(i, i + batch)]).items()}
        losses = objective.forward(model, b, torch.ones_like(b["labels"][:, 1:], dtype=torch.float32)).losses.double().cpu()
        for k in (k for j in range(i, i + batch) for k in by_row.get(j, ())):
            e = examples[k]
            of[k] = float(losses[e.row - i, e.start : e.stop - 1].sum()) / e.learnt
    dist.reshard(model)
    model.train(training)
    return of


def referenced(
    source: Checkpoint, rows: TokenRows, examples: list[Example], train: Train, seed: int, checkpoints: int | None
) -> np.ndarray:
    """Confidence of each example from a reference run of `source` on the same rows; kept in the cache, so that it is made once."""
    key = store_key("sftmix", source.fingerprint(), _fingerprint(rows), plain(train), seed, checkpoints, dist.world())
    file = cache_folder().parent / "confidence" / f"{key}.npy"
    there = file.is_file()
    if dist.broadcast(there) if dist.world() > 1 else there:
        return np.load(file)
    confidence = _trained(source, rows, examples, replace(train, record=False, report_to=[], save_every=10**9), seed, checkpoints)
    dist.barrier()
    if dist.rank() == 0:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(part := file.with_suffix(".part.npy"), confidence)
            part.replace(file)
    return confidence


def _trained(source: Checkpoint, rows: TokenRows, examples: list[Example], train: Train, seed: int, checkpoints: int | None) -> np.ndarray:
    """Plain tuning of a copy; the negative mean of the perplexities at its checkpoints."""
    model = source.model(precision.load_type(train, source.types()))
    objective, steps = NextToken(model, None, seed), steps_for(rows, train)
    count = checkpoints or (round(train.epochs) if train.epochs >= 2 and not train.tokens else 5)
    at = {max(1, round(steps * (c + 1) / count)) for c in range(count)}
    found: list[np.ndarray] = []

    def tick(step: int, of: int) -> None:
        if step in at:
            found.append(np.exp(mean_losses(model, objective, rows, examples, train.batch)))

    with tempfile.TemporaryDirectory() as folder:
        fit(model, rows, train, techniques=[], evals={}, folder=Path(folder), seed=seed, tick=tick, objective=objective)
    return -np.mean(found, 0)


def _fingerprint(rows: TokenRows) -> str:
    found = hashlib.sha256()
    for i in range(len(rows)):
        row = rows[i]
        for k in ("input_ids", "labels"):
            found.update(row[k][: int(row["length"])].numpy().tobytes())
    return found.hexdigest()
