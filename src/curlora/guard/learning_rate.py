"""The learning rate of a guarded training."""

from __future__ import annotations

import math

from curlora.guard.errors import GuardError

__all__ = ["learning_rate"]


def learning_rate(budget: float, steps: int, r: int) -> float:
    """A learning rate to begin with, for Adam and the like on a guarded adapter, in square roots of nats.

    In the guard's coordinates the predicted divergence is ``mean(V^2)``, and Adam's first step moves every entry of
    ``V`` by the rate: ``steps`` small steps reach the edge of the budget together only if the rate goes with the
    square root of the budget.

    Args:
        budget: in nats per token, as :class:`curlora.Guard` has it.
        steps: of the optimizer, in the whole training.
        r: the adapter's rank.

    Raises:
        GuardError: if one of them is not positive.
    """
    if not (budget > 0 and math.isfinite(budget) and steps > 0 and r > 0):
        raise GuardError(f"budget, steps and r must be positive, got {budget}, {steps} and {r}")
    return 0.6 * math.sqrt(budget) * math.sqrt(60 / steps)
