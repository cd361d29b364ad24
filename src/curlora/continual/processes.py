"""The processes of a run: one, or all that torchrun or accelerate launch began."""

from __future__ import annotations

import torch
from accelerate import PartialState

from curlora.continual.errors import RunError

__all__ = ["check_shared_out", "process_state", "use_cpu"]


def use_cpu() -> bool:
    """Whether there is no accelerator, and so the CPU is used."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Which process this is, of how many, on what device.

    Accelerate has to be told to join processes on CPUs.
    """
    return PartialState(cpu=True) if use_cpu() else PartialState()


def check_shared_out(batch_size: int) -> None:
    """Check that a batch can be shared out over the processes.

    Raises:
        RunError: if it cannot be, evenly.
    """
    processes = process_state().num_processes
    if batch_size % processes:
        raise RunError(f"A batch_size of {batch_size} cannot be shared out over {processes} processes evenly.")
