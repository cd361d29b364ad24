"""Triton kernels for the operations of :mod:`curlora.functional`, and the choice between the two.

Each operation has its own module and is a registered operator (:mod:`curlora.kernels.operators`).
:mod:`curlora.functional` is the reference for the kernels, and the default: no kernel has run on a GPU yet, so neither
their results nor their speed there are known. ``CURLORA_KERNELS=triton`` switches them on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from curlora._compat import transformed_by_torch_func
from curlora.kernels.operators import INTERPRETED

__all__ = ["MAX_RANK", "chosen", "use"]

MAX_RANK = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHOICES = ("torch", "triton")


def _checked(choice: str, name: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name} is {choice!r}; it must be one of {', '.join(map(repr, CHOICES))}.")
    return choice


_choice = _checked(os.environ.get("CURLORA_KERNELS", "torch"), "the environment variable CURLORA_KERNELS")


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose how adapted layers compute inside this context, in every thread.

    The environment variable ``CURLORA_KERNELS`` sets the choice for a whole process.

    Args:
        choice: ``"torch"``, the default, uses PyTorch's operators everywhere. ``"triton"`` uses kernels wherever they
            can run.

    Raises:
        ValueError: if ``choice`` is none of these.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "the choice of kernels")
    try:
        yield
    finally:
        _choice = before


def chosen(output: Tensor, scaled_U: Tensor, factor: Tensor, index: Tensor, offset: Tensor | None) -> bool:
    """Return whether a kernel computes the update of ``output``.

    Kernels run on NVIDIA GPUs from Ampere on, in float16, bfloat16 and float32, for ranks up to 256. Under
    ``torch.func``'s transforms, in forward-mode differentiation and for tensor subclasses such as distributed tensors,
    PyTorch's operators are used, which support all of these.
    """
    if _choice == "torch" or not (output.is_cuda or INTERPRETED):
        return False
    if index.shape[0] > MAX_RANK:
        return False
    for tensor in (output, scaled_U, factor, offset):
        if tensor is not None and not _fits(tensor, output.device):
            return False
    if transformed_by_torch_func() or _differentiated_forward(output, scaled_U, offset):
        return False
    return _runs_on(output.device.index)


def _fits(tensor: Tensor, device: torch.device) -> bool:
    known = tensor.dtype in DTYPES or (INTERPRETED and tensor.dtype == torch.float64)
    return known and tensor.device == device and type(tensor) in (Tensor, torch.nn.Parameter)


def _differentiated_forward(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@torch.compiler.assume_constant_result
def _runs_on(device: int | None) -> bool:
    return INTERPRETED or _fits_device(device)


@functools.cache
def _fits_device(device: int | None) -> bool:
    """Return whether Triton is installed, and the device is an NVIDIA GPU of compute capability 8.0 or higher."""
    found = importlib.util.find_spec("triton") is not None and torch.version.hip is None
    return found and torch.cuda.get_device_capability(device) >= (8, 0)
