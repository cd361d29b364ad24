"""Rank, broadcast and sum over the processes of ``torch.distributed``; without it, there is one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_all", "of_first", "rank_and_count", "sum_over_processes"]


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


def in_all(run: Callable[[], Any]) -> Any:
    """Call a function in every process, and return its value. If it raises in one of them, it raises in all.

    Otherwise the process that has failed would leave the others waiting for it.

    Raises:
        RuntimeError: if the function has raised in another process only.
    """
    processes = rank_and_count()[1]
    if processes == 1:
        return run()
    value, failure = None, None
    try:
        value = run()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * processes
    torch.distributed.all_gather_object(failures, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if elsewhere := [one for one in failures if one is not None]:
        raise RuntimeError(f"Another process has failed with {elsewhere[0]}")
    return value


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
