"""The processes of a run: one, or those that ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

import torch
from accelerate import PartialState

from curlora.continual.errors import RunError

__all__ = ["check_shared_out", "process_state", "use_cpu"]


def use_cpu() -> bool:
    """Whether the CPU is used, because there is no accelerator."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Return this process's rank, the number of processes, and the device.

    Accelerate joins processes on CPUs only with ``cpu=True``.
    """
    return PartialState(cpu=True) if use_cpu() else PartialState()


def check_shared_out(batch_size: int) -> None:
    """Check that a batch can be divided evenly among the processes.

    Raises:
        RunError: if ``batch_size`` is not a multiple of the number of processes.
    """
    processes = process_state().num_processes
    if batch_size % processes:
        raise RunError(
            f"A batch_size of {batch_size} cannot be divided evenly among {processes} processes. Set batch_size to a "
            f"multiple of {processes}."
        )
