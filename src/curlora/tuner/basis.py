"""The drawn columns and rows of a frozen weight, which are all that an adapter needs of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from curlora.tuner.fingerprint import fingerprint

__all__ = ["Basis", "problem_of_indices"]


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Columns and rows of one frozen weight. It is immutable, so adapters with the same indices share one.

    ``factor`` spans the updates of the layer's output, and ``reader`` projects its input. They are ``C`` and ``R`` of
    ``W + alpha C U R``. In layers that store ``(in_features, out_features)`` they are ``R^T`` and ``C^T`` instead. Each
    of ``E`` experts has its own columns and rows, so all shapes but the fingerprint's have a first dimension ``E``.

    Args:
        indices: int32, shape ``(2, r)``: the column indices, then the row indices; for experts ``(E, 2, r)``.
        fingerprint: fingerprint of ``factor`` (:mod:`curlora.tuner.fingerprint`), int32, shape ``(8,)``.
        factor: shape ``(out_features, r)``: ``W[:, columns]``, or ``W[rows, :].T`` if the layer stores
            ``(in_features, out_features)``. In the weight's dtype, or in a quantized layer's compute dtype.
        gathered: indices of the outputs that are ``R x``, int64, shape ``(r,)``: the rows, or the columns if the layer
            stores ``(in_features, out_features)``.
        reader: the other factor, shape ``(r, in_features)``; only if ``R x`` cannot be gathered from an output.
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
        """Make a basis from what was read from a weight, on the device of ``factor``.

        Args:
            indices, gathered, factor, reader: as for :class:`Basis`; ``indices`` and ``gathered`` are copied.
            exact: as for :func:`curlora.tuner.fingerprint.fingerprint`.
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
        """All tensors of the basis, without those that are ``None``."""
        held = (self.indices, self.fingerprint, self.factor, self.gathered, self.reader)
        return tuple(tensor for tensor in held if tensor is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Basis:
        """Return a basis with ``function`` applied to each tensor, like :meth:`torch.nn.Module._apply`."""
        indices, fingerprint, factor, gathered, *reader = map(function, self.tensors)
        return Basis(indices, fingerprint, factor, gathered, reader[0] if reader else None, self.key)

    def to(self, device: torch.device) -> Basis:
        """Return this basis on ``device``. Copies are cached: a hook may run a layer on another device every time."""
        if self.factor.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = self.map(lambda tensor: tensor.to(device))
        return self._moved[device]


def problem_of_indices(indices: Tensor, r: int, weight_shape: tuple[int, ...]) -> str | None:
    """Return what is wrong with indices for a weight, as a phrase; ``None`` if they fit.

    Args:
        indices: the column indices, then the row indices; they should be int32 of shape ``(2, r)``, for experts
            ``(E, 2, r)``.
        r: the expected rank.
        weight_shape: shape of the weight as stored, ``(rows, columns)``; for experts ``(E, rows, columns)``.
    """
    *experts, height, width = weight_shape
    expected = (*experts, 2, r)
    if indices.shape != expected or indices.dtype != torch.int32:
        return f"the indices are {indices.dtype} of shape {tuple(indices.shape)} instead of int32 of shape {expected}"
    for axis, index, size in (("column", indices[..., 0, :], width), ("row", indices[..., 1, :], height)):
        if index.min() < 0 or index.max() >= size:
            return f"{axis} index {int(index.min() if index.min() < 0 else index.max())} is outside 0..{size - 1}"
    return None
