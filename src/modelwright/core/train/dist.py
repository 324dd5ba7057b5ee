"""Several processes (torchrun): who am I, sums over all, shards, and the assertion that as many run as were asked for."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelwright.core.errors import UserError


def world() -> int:
    """Processes that take part; 1 when none was launched."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def start(asked: int) -> None:
    """Join the other processes; UserError unless exactly `asked` run. Some launchers silently start one."""
    if world() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    require_world(asked)


def end() -> NoReturn:
    """End this process together with the others. Threads of connections sometimes abort an interpreter that shuts down."""
    barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def require_world(asked: int) -> None:
    """UserError unless exactly `asked` processes run."""
    if world() != asked:
        raise UserError(
            f"{asked} processes were asked for and {world()} run", "the launcher started another number", "launch with torchrun"
        )


def broadcast(value: Any = None) -> Any:
    """A plain value of the first process, on all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    if world() > 1 and dist.is_initialized():
        dist.barrier()


def all_sum(flat: Tensor) -> Tensor:
    """One tensor summed over all processes, in place."""
    if world() > 1 and dist.is_initialized():
        dist.all_reduce(flat)
    return flat


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return bool(all_sum(torch.tensor(int(flag)))) if world() > 1 else flag


def sum_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each scalar summed over all processes, in one flat collective."""
    if world() == 1 or not dist.is_initialized():
        return list(values)
    return list(all_sum(torch.stack([v.double().to(values[0].device) for v in values])).unbind())


# ---- shards (FSDP2) --------------------------------------------------------------------------------------------------
def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor; shares memory."""
    return t.to_local() if hasattr(t, "to_local") else t


def offset(t: Any) -> int | None:
    """Where this process's shard begins along dimension 0; None for a tensor that is whole here."""
    if not hasattr(t, "to_local"):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(p.is_shard() and p.dim != 0 for p in t.placements):
        raise RuntimeError(f"sharded along another dimension than 0: {t.placements}")
    return int(compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1][0])


def rows_of(t: Any, whole: Tensor) -> Tensor:
    """The part of `whole` (len(t), ...) that belongs to this process's shard of t."""
    start = offset(t)
    return whole if start is None else whole[start : start + local(t).shape[0]]


def like(p: Any, piece: Tensor) -> Tensor:
    """This process's piece of a tensor that is sharded like p."""
    if not hasattr(p, "to_local"):
        return piece
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(piece, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def layout(strategy: str, replicas: int | None = None) -> Any:
    """transformers' plan of a strategy, by which each process reads its own part of a checkpoint; None for whole copies.

    hsdp: `replicas` copies of the sharded model, one a machine unless given. ep: experts on all processes, the rest in shards.
    """
    if world() == 1 or strategy == "ddp":
        return None
    from transformers import DistributedConfig

    if strategy == "ep":
        return DistributedConfig(fsdp_size=world(), ep_size=world(), ep_implementation="modelwright")
    copies = _copies(replicas) if strategy == "hsdp" else 1
    return DistributedConfig(fsdp_size=world() // copies, dp_replicate_size=copies)


@contextlib.contextmanager
def cut_at(blocks: list[str]) -> Iterator[None]:
    """Let transformers shard a model that it loads as `shard` does: the blocks, and one group for the rest.

    Its own plan has a group for the head, which would be gathered anew for each chunk of tokens (core/train/head.py).
    """
    from transformers import PreTrainedModel

    original: Any = PreTrainedModel._resolve_parallel_plans

    def plans(self: Any, config: Any) -> Any:
        tensor, expert, _ = original(self, config)
        return tensor, expert, dict.fromkeys(blocks, "free_full_weight")

    PreTrainedModel._resolve_parallel_plans = plans  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel._resolve_parallel_plans = original  # type: ignore[method-assign]


def _copies(replicas: int | None) -> int:
    copies = replicas or world() // int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    if world() % copies:
        raise UserError(f"train.replicas={copies} does not divide {world()} processes", "each copy has as many", "choose a divisor")
    return copies


def shard(model: nn.Module, blocks: list[nn.Module], strategy: str = "fsdp2", replicas: int | None = None) -> None:
    """FSDP2: each block and the rest become one sharding group, over all processes or within each copy (hsdp)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    copies = _copies(replicas) if strategy == "hsdp" else 1
    sizes, names = ((world(),), ("fsdp",)) if copies == 1 else ((copies, world() // copies), ("dp_replicate", "fsdp"))
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def in_parts(model: nn.Module, blocks: list[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The tensors of a sharded model, whole and on the CPU, one block at a time; every process must go through them together.

    Only the first process gets the values; to the others they are empty.
    """
    stored = model.state_dict().keys()
    held = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in stored}
    names = {id(m): n for n, m in model.named_modules()}
    groups: dict[str, dict[str, Any]] = {f"{names[id(b)]}.": {} for b in blocks}
    for n, t in held.items():
        groups.setdefault(next((g for g in groups if g and n.startswith(g)), n), {})[n] = t
    for group in groups.values():
        part = {}
        for n, t in group.items():
            whole = t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach()
            part[n] = whole.cpu() if rank() == 0 else torch.empty(0)
        yield part


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward pass leaves behind."""
    for module in model.modules():
        if free := getattr(module, "reshard", None):
            free()  # type: ignore[operator]


def gathered(model: nn.Module, empty: Any) -> Any:
    """The whole model on the first process, in `empty`, a copy on the meta device; None elsewhere. Every process must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank():
        return None
    empty.load_state_dict(whole, strict=False, assign=True)
    if hasattr(empty, "tie_weights"):
        empty.tie_weights()
    if left := [n for n, p in empty.named_parameters() if p.is_meta]:
        raise RuntimeError(f"not gathered: {left[:3]}")
    return empty


def emptied(model: nn.Module) -> nn.Module:
    """A copy of the model with its parameters on the meta device."""
    import copy

    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
