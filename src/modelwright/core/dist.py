"""Several processes (torchrun): who am I, sums over all, and the assertion that as many run as were asked for."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from modelwright.core.errors import UserError


def world() -> int:
    """Processes that take part; 1 when none was launched."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def require_world(asked: int) -> None:
    """UserError unless exactly `asked` processes run. Some launchers silently start one."""
    if world() != asked:
        raise UserError(
            f"{asked} processes were asked for and {world()} run", "the launcher started another number", "launch with torchrun"
        )


def sum_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each scalar summed over all processes, in one flat collective."""
    if world() == 1 or not dist.is_initialized():
        return list(values)
    flat = torch.stack([v.double().to(values[0].device) for v in values])
    dist.all_reduce(flat)
    return list(flat.unbind())
