"""Which of several processes this is, and what all of them have together; one process where nothing is distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["of_first", "rank_and_count", "sum_over_processes"]


def rank_and_count() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_first(value: Any, device: torch.device | None = None) -> Any:
    """What the first process has, in every process.

    Args:
        value: this process's; it only matters in the first.
        device: that the exchange goes over; the process group's own choice if ``None``.
    """
    if rank_and_count()[1] == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0, device=device)
    return held[0]


def sum_over_processes(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Of each tensor the sum over all processes, in one exchange; as they are where there is one."""
    if rank_and_count()[1] == 1:
        return tensors
    flat = torch.cat([tensor.to(device=device, dtype=torch.float64).flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    return list(flat.split([tensor.numel() for tensor in tensors]))
