"""Tensors that are sharded over processes, as in FSDP2 (``DTensor``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from curlora._compat import copy_into

__all__ = ["assign", "laid_out_like", "reshard", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor. Every process must call this, and every process gets all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Shard ``value``, which every process holds in full, like ``tensor``.

    If ``tensor`` is not sharded, or ``value`` is sharded already, return ``value`` unchanged.
    """
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        return value
    mesh = tensor.device_mesh
    replicated = DTensor.from_local(value.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, tensor.placements)


def reshard(model: nn.Module) -> None:
    """Drop the full parameters that FSDP2 may keep after a forward pass. Writes to the shards would not change them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def assign(tensors: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    """Copy ``values``, which every process holds in full, into ``tensors``, which may be sharded."""
    pairs = list(zip(tensors, values, strict=True))
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        for tensor, value in pairs:
            tensor.copy_(laid_out_like(value, tensor))
    elif pairs:
        copy_into(list(tensors), [value for _, value in pairs])
