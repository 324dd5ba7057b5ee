"""What every way to make a mixture from dense checkpoints writes besides its experts and routers."""

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from modelwright.core.model.anatomy import Anatomy, Ffn
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reshape.experts.stock import Target

Get = Callable[[str], Tensor]  # a weight by its name in the dense model


def matrices(get: Get, ffn: Ffn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate (F, d), up (F, d), down (d, F) of a gated feed-forward part."""
    assert ffn.gate is not None
    return ffn.gate.read(get).to(dtype), ffn.up.read(get).to(dtype), ffn.down.read(get).to(dtype)


def dense_parts(gets: list[Get], anatomy: Anatomy, source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Everything but the feed-forward parts, averaged over several models, under the names of the unfused stock classes."""
    for part in anatomy:
        if part.role.startswith("ffn."):
            continue
        tensor = gets[0](part.name)
        if len(gets) > 1:
            tensor = cast(Tensor, sum(get(part.name).double() for get in gets)) / len(gets)
        tensor = tensor.to(source.dtype(part.name))
        if part.role == "attn.qkv":
            for piece, slices in part.rows.items():
                yield part.name.replace("qkv_proj", f"{piece}_proj"), torch.cat([tensor[s] for s in slices])
        else:
            yield part.name, tensor


def silent_shared(target: Target, layer: str, dense: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The shared expert that Qwen2-MoE wants: its down_proj is zero, so that it says nothing until it is trained."""
    if target.shared:
        gate, up, down = (dense[0][: target.shared], dense[1][: target.shared], torch.zeros_like(dense[2][:, : target.shared]))
        for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            yield f"{layer}.{target.moe}.shared_expert.{name}.weight", tensor
        yield f"{layer}.{target.moe}.shared_expert_gate.weight", torch.zeros(1, dense[0].shape[1], dtype=dense[0].dtype)


def dtypes_of(source: Checkpoint, anatomy: Anatomy, target: Target, experts: int) -> dict[str, torch.dtype]:
    """The type of every tensor of the mixture, as the dense model's; biases that the class adds are not among them."""
    found: dict[str, torch.dtype] = {}
    for part in anatomy:
        if part.role == "attn.qkv":
            found |= {part.name.replace("qkv_proj", f"{p}_proj"): source.dtype(part.name) for p in part.rows}
        elif not part.role.startswith("ffn."):
            found[part.name] = source.dtype(part.name)
    for b in anatomy.blocks:
        dtype = source.dtype(anatomy.ffn(b).down.name)
        found |= dict.fromkeys(target.names(b.path, experts), dtype)
        if target.shared:
            at = f"{b.path}.{target.moe}.shared_expert"
            found |= dict.fromkeys([f"{at}.gate_proj.weight", f"{at}.up_proj.weight", f"{at}.down_proj.weight", f"{at}_gate.weight"], dtype)
    return found


def zero_biases(target: Target, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Biases on q, k and v that the class has and the dense model has not; their types are added to `dtypes`."""
    found = {}
    for name, shape in target.biases().items():
        if name not in dtypes:
            dtypes[name] = dtypes[name.replace(".bias", ".weight")]
            found[name] = torch.zeros(shape, dtype=dtypes[name])
    return found


def written_config(target: Target) -> dict[str, Any]:
    """The config as it is written to disk."""
    return json.loads(target.config.to_json_string())
