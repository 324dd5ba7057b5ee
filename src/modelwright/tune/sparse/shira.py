"""Sparse differences as a `shira` adapter, the format of PEFT for them: 2 x n indices and n values a matrix, n = r (out + in)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modelwright.tune.sparse.layer import Delta


def adapter_rank(deltas: Iterable[Delta]) -> int:
    """The smallest r whose n holds the entries of every matrix; 0 where a matrix is too small for it."""
    deltas = list(deltas)
    r = max(-(-len(d.indices) // sum(d.shape)) for d in deltas)
    return r if all(r * sum(d.shape) <= d.numel for d in deltas) else 0


def save_adapter(folder: Path, entries: dict[str, tuple[Delta, Tensor]], r: int, model: Any) -> None:
    """Write the adapter: places and values of each matrix by its path, filled up with zeros."""
    from peft import ShiraConfig

    tensors: dict[str, Tensor] = {}
    for path, (delta, values) in entries.items():
        n, width = r * sum(delta.shape), delta.shape[1]
        places = torch.zeros(n, dtype=torch.long)
        places[: len(values)] = delta.indices.cpu().long()
        filled = torch.zeros(n)
        filled[: len(values)] = values.cpu().float()
        tensors[f"base_model.model.{path}.shira_weight"] = filled
        tensors[f"base_model.model.{path}.shira_indices"] = torch.stack([places // width, places % width]).int()
    folder.mkdir(parents=True, exist_ok=True)
    config = ShiraConfig(r=r, target_modules=sorted(entries), base_model_name_or_path=getattr(model, "name_or_path", ""))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
