"""How differently domains are routed, from recorded counts: the Jensen-Shannon divergence of each layer, in bits.

The file has one row per model, domain, layer and expert; `token_assignments` counts the tokens that were sent there. The
released counts of Drop-Upcycling (2502.19261) have this form. A row that is not there counts as 0, as in those counts, and
the number of such rows is reported.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError, did_you_mean
from modelwright.moe.load import divergence

_COLUMNS = ("model", "domain", "layer", "expert", "token_assignments")


def read_counts(path: Path) -> tuple[dict[str, Tensor], list[str], dict[str, int]]:
    """Counts (domains, layers, E) by model, the domains' names, and by model how many cells had no row and are 0."""
    file = path / "expert_counts.csv" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no routing counts at {file}", how="give a csv file, or a folder that holds expert_counts.csv")
    with open(file, newline="", encoding="utf-8", errors="replace") as handle:
        reader = csv.DictReader(handle)
        for name in _COLUMNS:
            if name not in (reader.fieldnames or []):
                raise UserError(
                    f"{file} has no column '{name}'", f"it needs {', '.join(_COLUMNS)}", did_you_mean(name, reader.fieldnames or [])
                )
        cells: dict[str, dict[tuple[str, int, int], float]] = {}
        for number, row in enumerate(reader, 2):
            try:
                key = row["domain"], int(row["layer"]), int(row["expert"])
                value = float(row["token_assignments"])
            except (TypeError, ValueError):
                raise UserError(f"line {number} of {file} is no count", "layer, expert and token_assignments are numbers") from None
            own = cells.setdefault(row["model"], {})
            if key in own or value < 0:
                raise UserError(f"line {number} of {file} does not fit", "a count is negative or stands twice", "give each cell once")
            own[key] = value
    if not cells:
        raise UserError(f"{file} holds no counts", "it has no rows")
    domains = list(dict.fromkeys(d for own in cells.values() for d, _, _ in own))
    found = {model: _table(own, domains, f"{model} in {file}") for model, own in cells.items()}
    if len(domains) < 2:
        raise UserError(f"{file} has one domain only", "a divergence is between domains", "count at least two kinds of text")
    return found, domains, {model: found[model].numel() - len(own) for model, own in cells.items()}


def _table(cells: dict[tuple[str, int, int], float], domains: list[str], where: str) -> Tensor:
    layers, experts = sorted({layer for _, layer, _ in cells}), sorted({e for _, _, e in cells})
    rows = [[[cells.get((d, la, e), 0.0) for e in experts] for la in layers] for d in domains]
    table = torch.tensor(rows, dtype=torch.float64)
    if bool((empty := table.sum(2) == 0).any()):
        d, la = empty.nonzero()[0].tolist()
        raise UserError(f"{where} counts no token of {domains[d]} in layer {layers[la]}", "its load is undefined", "leave the domain out")
    return table


def routing_metrics(counts: dict[str, Tensor], domains: list[str], absent: dict[str, int]) -> dict[str, Any]:
    """By model: the divergence of each layer in bits and its mean, and the most it can be."""
    found: dict[str, Any] = {}
    for model, table in counts.items():
        bits = divergence(table)
        found[model] = {"divergence_bits": float(bits.mean()), "layers": [float(b) for b in bits], "cells_without_row": absent[model]}
    return {"domains": domains, "most_bits": float(torch.tensor(float(len(domains))).log2()), "models": found}
