"""The coordinates that a guarded adapter is trained in: pure linear algebra on ``r x r`` matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coordinates", "coordinates"]


class Coordinates(NamedTuple):
    """``M = left @ V @ right``; float64, each of shape ``(r, r)`` and symmetric."""

    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor


def coordinates(left: Tensor, right: Tensor, damping: float) -> Coordinates | None:
    """Coordinates ``V`` of ``M`` in which a Kronecker-factored quadratic form is a squared length.

    With ``M = L^(-1/2) V R^(-1/2)``

        1/2 tr(M^T L M R) = 1/2 ||V||_F^2

    Both sides are damped by ``damping`` times their mean eigenvalue: directions that hardly count, repeated columns or
    rows among them, count that much at least.

    Args:
        left: ``L``, symmetric, shape ``(r, r)``.
        right: ``R``, likewise.
        damping: positive.

    Returns:
        ``M = left @ V @ right``; ``None`` if a side is zero, and so nothing known.
    """
    sides = []
    for moment in (left, right):
        scale = moment.diagonal().mean()
        if not scale > 0:
            return None
        damped = moment.double() / scale + damping * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        values, vectors = torch.linalg.eigh((damped + damped.T) / 2)
        values = values.clamp_min(damping)  # rounding may have taken some lower
        sides += [(vectors * (values * scale) ** power) @ vectors.T for power in (-0.5, 0.5)]
    return Coordinates(left=sides[0], right=sides[2], left_inverse=sides[1], right_inverse=sides[3])
