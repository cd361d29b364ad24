"""Rank, broadcast and sum over the processes of ``torch.distributed``; without it, there is one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["of_first", "rank_and_count", "sum_over_processes"]


def rank_and_count() -> tuple[int, int]:
    """Return the rank of this process, from 0, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_first(value: Any, device: torch.device | None = None) -> Any:
    """Return the first process's value in every process.

    Args:
        value: this process's value, any object that can be pickled; only that of the first process is used.
        device: the device for the broadcast; the process group's default if ``None``.
    """
    if rank_and_count()[1] == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0, device=device)
    return held[0]


def sum_over_processes(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Sum each tensor over all processes, in one all-reduce.

    Args:
        tensors: the tensors, each of the same shape in all processes.
        device: the device for the all-reduce.

    Returns:
        The sums as flat float64 tensors on ``device``; with one process, ``tensors`` unchanged.
    """
    if rank_and_count()[1] == 1:
        return tensors
    flat = torch.cat([tensor.to(device=device, dtype=torch.float64).flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    return list(flat.split([tensor.numel() for tensor in tensors]))
