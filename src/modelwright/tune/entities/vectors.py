"""A table of entity vectors from npz, parquet, json or jsonl: TransE, a sentence encoder, whatever gives one vector an entity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.tables import column, table
from modelwright.core.errors import UserError, short

_IDS, _VECTORS = ("id", "ids", "entity", "qid"), ("vector", "vectors", "embedding", "embeddings")


@dataclass(frozen=True)
class Vectors:
    """places: entity id -> row; values (K, d) fp32."""

    places: dict[str, int]
    values: Tensor

    def __len__(self) -> int:
        return len(self.places)


def read_vectors(path: str) -> Vectors:
    """The vectors of a file. UserError for one that is missing, of another width, not finite or there twice."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no vectors at {path}", how="give an npz, parquet, json or jsonl file with id and vector")
    ids, rows = _npz(file) if file.suffix == ".npz" else _table(file)
    if len(ids) != len(rows) or not len(ids):
        raise UserError(f"{path} has {len(ids)} ids and {len(rows)} vectors", "each entity needs one", "repair the file")
    widths = {len(r) for r in rows} if isinstance(rows, list) else {rows.shape[-1]}
    if len(widths) > 1 or (not isinstance(rows, list) and rows.ndim != 2):
        raise UserError(f"the vectors of {path} have several widths", f"they are {sorted(widths)[:4]}", "all must have one")
    values = torch.from_numpy(np.asarray(rows, np.float32))
    bad = (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the vector of {ids[bad[0]]} in {path} is not finite", f"{len(bad)} vectors hold NaN or infinity", "leave them out"
        )
    places = {str(name): i for i, name in enumerate(ids)}
    if len(places) < len(ids):
        raise UserError(f"an entity stands twice in {path}", f"{len(ids) - len(places)} ids are repeated", "keep one vector of each")
    return Vectors(places, values)


def _npz(file: Path) -> tuple[list[Any], Any]:
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read", short(error), "write ids as text and vectors as numbers") from None
    names = [next((n for n in some if n in arrays), None) for some in (_IDS, _VECTORS)]
    if None in names:
        raise UserError(f"{file} holds {', '.join(arrays) or 'nothing'}", "ids and vectors are needed", "name them so")
    return arrays[str(names[0])].tolist(), arrays[str(names[1])]


def _table(file: Path) -> tuple[list[Any], list[Any]]:
    found = table(file)
    names = [next((n for n in some if n in found[0]), some[0]) for some in (_IDS, _VECTORS)]
    ids, rows = (column(file, found, n) for n in names)
    wrong = next((i for i, r in enumerate(rows) if not isinstance(r, list) or not r), None)
    if wrong is not None:
        raise UserError(f"row {wrong + 1} of {file} has no vector", "a list of numbers is needed", "repair or remove the row")
    return ids, rows
