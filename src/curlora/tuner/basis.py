"""What an adapter needs of its frozen weight: the columns and rows that were drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from curlora.tuner.fingerprint import fingerprint

__all__ = ["Basis", "problem_of_indices"]


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Columns and rows of one frozen weight. Nothing in it is ever written to, so adapters drawn alike share one.

    ``factor`` is what the layer's output moves along, and ``reader`` what its input is read by: ``C`` and ``R`` of
    ``W + alpha C U R``, except in layers that store ``(in_features, out_features)``, where they are ``R^T`` and
    ``C^T``. For experts, of which each has its own, every shape is led by their number ``E``.

    Args:
        indices: columns above rows, int32, shape ``(2, r)``; of experts ``(E, 2, r)``.
        fingerprint: of the selected columns or rows (:mod:`curlora.tuner.fingerprint`), int32, shape ``(8,)``.
        factor: ``W[:, columns]``, or ``W[rows, :].T`` in a layer that stores its outputs last; shape
            ``(out_features, r)``, in the weight's dtype, or that in which a quantized layer computes.
        gathered: which outputs are ``R x``: the rows, or there the columns; int64, shape ``(r,)``.
        reader: the other side, ``(r, in_features)``; only where ``R x`` cannot be gathered from an output.
    """

    indices: Tensor
    fingerprint: Tensor
    factor: Tensor
    gathered: Tensor
    reader: Tensor | None = None
    key: bytes = b""
    _moved: dict[torch.device, Basis] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.indices.detach().cpu().numpy().tobytes())

    @classmethod
    def taken(
        cls, indices: Tensor, gathered: Tensor, factor: Tensor, reader: Tensor | None, *, exact: bool = True
    ) -> Basis:
        """A basis of what was read of a weight, on the device of that.

        Args:
            indices, gathered, factor, reader: as above; the first two are copied.
            exact: as :func:`curlora.tuner.fingerprint.fingerprint` has it.
        """
        device = factor.device
        return cls(
            indices=indices.to(device, torch.int32, copy=True),
            fingerprint=fingerprint(factor.flatten(0, -2), exact).to(device),
            factor=factor,
            gathered=gathered.to(device, torch.int64, copy=True),
            reader=reader,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held of the weight."""
        held = (self.indices, self.fingerprint, self.factor, self.gathered, self.reader)
        return tuple(tensor for tensor in held if tensor is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Basis:
        """A basis of what ``function`` makes of each tensor, as :meth:`torch.nn.Module._apply` has it."""
        indices, fingerprint, factor, gathered, *reader = map(function, self.tensors)
        return Basis(indices, fingerprint, factor, gathered, reader[0] if reader else None, self.key)

    def to(self, device: torch.device) -> Basis:
        """This basis on a device. A copy is made once for each: hooks may run a layer elsewhere than it lies."""
        if self.factor.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = self.map(lambda tensor: tensor.to(device))
        return self._moved[device]


def problem_of_indices(indices: Tensor, r: int, weight_shape: tuple[int, ...]) -> str | None:
    """What is wrong with indices for a weight, as a phrase; ``None`` if nothing.

    Args:
        indices: columns above rows.
        r: the rank that they should have.
        weight_shape: as the weight is stored, ``(rows, columns)``; of experts ``(E, rows, columns)``.
    """
    *experts, height, width = weight_shape
    expected = (*experts, 2, r)
    if indices.shape != expected or indices.dtype != torch.int32:
        return f"the indices are {indices.dtype} of shape {tuple(indices.shape)} instead of int32 of shape {expected}"
    for axis, index, size in (("column", indices[..., 0, :], width), ("row", indices[..., 1, :], height)):
        if index.min() < 0 or index.max() >= size:
            return f"{axis} index {int(index.min() if index.min() < 0 else index.max())} is outside 0..{size - 1}"
    return None
