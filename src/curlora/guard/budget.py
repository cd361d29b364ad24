"""Keeping a promise by measurement: a step is taken back as far as it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["keep_within"]


@torch.no_grad()
def keep_within(
    limit: float,
    measure: Callable[[], float],
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    tolerance: float = 0.05,
    trials: int = 10,
) -> tuple[float, float]:
    """Scale the step from ``before`` to where ``parameters`` are now back along itself, until a measurement allows it.

    Bisection between a point that was measured to be within the limit and one that was not, begun where the square law
    of a small step would have it. Whatever the curve between them, the end is a point that was measured to be within.

    Args:
        limit: the most that ``measure`` may give, positive.
        measure: of the model as the parameters are at that moment. What is not a number is over the limit.
        parameters: left at the end of the scaled step.
        before: their values before the step.
        tolerance: how much of the limit may be left unused, as a share of it.
        trials: how often is measured at most, the two ends not counted.

    Returns:
        The scale, 1 where nothing had to be taken back and 0 where all of it had to, and what was measured there. Above
        the limit only if it was so before the step.
    """
    after = [parameter.detach().clone() for parameter in parameters]

    def at(scale: float) -> float:
        for parameter, old, new in zip(parameters, before, after, strict=True):
            # The ends as they are: between a number and one that is not finite there is nothing.
            parameter.copy_(new if scale == 1 else old if scale == 0 else torch.lerp(old.to(new), new, scale))
        value = measure()
        return value if math.isfinite(value) else math.inf

    over, found = 1.0, at(1.0)
    if found <= limit:
        return 1.0, found
    within, best = 0.0, at(0.0)
    if best > limit or not all(bool(new.isfinite().all()) for new in after):
        return 0.0, best
    guess = math.sqrt((limit - best) / (found - best)) * (1 - tolerance / 2)
    scale = 0.0
    for _ in range(trials):
        scale = guess if within < guess < over else (within + over) / 2
        guess = 0.0
        value = at(scale)
        if value > limit:
            over = scale
        else:
            within, best = scale, value
            if best >= (1 - tolerance) * limit:
                break
    if scale != within:  # the last one measured was not the best
        at(within)
    return within, best
