"""The coordinates that a guarded adapter is trained in, computed from its ``r x r`` moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coordinates", "coordinates"]


class Coordinates(NamedTuple):
    """The map ``M = left @ V @ right`` and its inverse; all four are symmetric, float64, of shape ``(r, r)``."""

    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor


def coordinates(left: Tensor, right: Tensor, damping: float) -> Coordinates | None:
    """Return coordinates ``V`` of ``M`` in which a Kronecker-factored quadratic form is a squared norm.

    With ``M = L^(-1/2) V R^(-1/2)``,

        1/2 tr(M^T L M R) = 1/2 ||V||_F^2

    ``damping`` times the mean eigenvalue of each of ``L`` and ``R`` is added to its diagonal. No direction then has a
    weight below this; repeated columns or rows would have a weight of zero.

    Args:
        left: ``L``, symmetric and positive semidefinite, shape ``(r, r)``.
        right: ``R``, likewise.
        damping: the share of the mean eigenvalue that is added, positive.

    Returns:
        The coordinates, or ``None`` if ``L`` or ``R`` is zero: the form then says nothing about the layer.
    """
    sides = []
    for moment in (left, right):
        scale = moment.diagonal().mean()
        if not scale > 0:
            return None
        damped = moment.double() / scale + damping * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        values, vectors = torch.linalg.eigh((damped + damped.T) / 2)
        values = values.clamp_min(damping)  # rounding may make some smaller
        sides += [(vectors * (values * scale) ** power) @ vectors.T for power in (-0.5, 0.5)]
    return Coordinates(left=sides[0], right=sides[2], left_inverse=sides[1], right_inverse=sides[3])
