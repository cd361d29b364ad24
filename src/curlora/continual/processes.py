"""The processes of a run: one, or all that torchrun or accelerate launch began."""

from __future__ import annotations

import torch
from accelerate import PartialState

__all__ = ["process_state", "use_cpu"]


def use_cpu() -> bool:
    """Whether there is no accelerator, and so the CPU is used."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Which process this is, of how many, on what device.

    Accelerate has to be told to join processes on CPUs.
    """
    return PartialState(cpu=True) if use_cpu() else PartialState()
