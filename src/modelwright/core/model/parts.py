"""Saving a model that no process holds whole: its tensors come one block at a time and go to their places on disk."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.model.checkpoint import Checkpoint, require_finite
from modelwright.core.model.classes import config_of, disk_shapes, skeleton
from modelwright.core.model.writer import Blueprint, Built, Piece, set_stops, write_tensors


def write_parts(built: Built, parts: Iterable[dict[str, Tensor]], dtype: str, folder: Path, shard_size: int) -> dict[str, Any]:
    """Write a model whose whole tensors come in `parts`, named as in memory, in the type of the source or in `dtype`.

    built.model lends its config alone. Returns facts: where generation stops.
    """
    from transformers.core_model_loading import revert_weight_conversion

    assert built.source is not None
    source, tokenizer = built.source, built.tokenizer
    if built.stops and tokenizer is None:
        tokenizer = source.tokenizer()
    if "use_cache" in source.config:
        built.model.config.use_cache = source.config["use_cache"]
    facts = set_stops(built.model, tokenizer, built.stops)
    config = json.loads(built.model.config.to_json_string())
    config.pop("distributed_config", None)
    config["architectures"] = source.config.get("architectures", config.get("architectures"))
    kinds = types_on_disk(config, source, dtype)
    config["dtype"] = str(max(set(kinds.values()), key=list(kinds.values()).count)).removeprefix("torch.")
    meta = skeleton(config_of(config))

    def stream() -> Iterator[Piece]:
        for part in parts:
            for name, tensor in revert_weight_conversion(meta, dict(part)).items():
                require_finite(name, tensor, "the result")
                yield name, tensor.to(kinds[name]).contiguous()

    write_tensors(Blueprint(config, kinds, stream, source), folder, shard_size)
    if built.model.can_generate() and getattr(built.model, "generation_config", None) is not None:
        built.model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return facts


def types_on_disk(config: dict[str, Any], source: Checkpoint, dtype: str) -> dict[str, torch.dtype]:
    """The type of each tensor of the result: the source's, its usual one for tensors that it has not, or `dtype` for all."""
    found = [source.dtype(n) for n in source.table]
    usual = max(set(found), key=found.count)
    wanted = None if dtype == "source" else getattr(torch, dtype)
    return {n: wanted or (source.dtype(n) if n in source else usual) for n in disk_shapes(config_of(config))}
