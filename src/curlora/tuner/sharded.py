"""Tensors of which each process holds a piece, as FSDP2 has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from curlora._compat import copy_into

__all__ = ["assign", "laid_out_like", "reshard", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(value: Tensor, tensor: Tensor) -> Tensor:
    """``value``, which every process holds in whole, in pieces as those of ``tensor``, if it is in pieces.

    A value that is in pieces already stays as it is.
    """
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    mesh = tensor.device_mesh
    replicated = DTensor.from_local(value.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, tensor.placements)


def reshard(model: nn.Module) -> None:
    """Drop what FSDP2 may have gathered and kept after a forward pass: writing to the pieces would not change that."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def assign(tensors: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    """Copy ``values``, each of which every process holds in whole, into ``tensors``."""
    pairs = list(zip(tensors, values, strict=True))
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        for tensor, value in pairs:
            tensor.copy_(laid_out_like(value, tensor))
    elif pairs:
        copy_into(list(tensors), [value for _, value in pairs])
