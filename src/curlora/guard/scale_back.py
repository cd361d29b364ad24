"""Keeping a promise by measurement: a step is taken back as far as it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curlora.guard.processes import of_first
from curlora.tuner.sharded import laid_out_like, whole

__all__ = ["scale_to_limit"]


@torch.no_grad()
def scale_to_limit(
    limit: float,
    measure: Callable[[], float],
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    tolerance: float = 0.05,
    trials: int = 10,
) -> tuple[float, float]:
    """Scale the step from ``before`` to where ``parameters`` are now back along itself, until a measurement allows it.

    Between a point that was measured to be within the limit and one that was not, the next is where a parabola through
    the last two and the start would have it, or a power where the last is far from the limit, and every third time
    their middle. Whatever the curve between them, the end is a point that was measured to be within. Where
    ``torch.distributed`` runs every process calls it, and what the first one measures decides for all. After an error
    in ``measure`` the parameters are as they were.

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
    finite = all(bool(whole(new).isfinite().all()) for new in after)
    # FSDP2 may have put parameters into pieces since.
    before = [
        laid_out_like(old, new).to(device=new.device, dtype=new.dtype) for old, new in zip(before, after, strict=True)
    ]

    def at(scale: float) -> float:
        for parameter, old, new in zip(parameters, before, after, strict=True):
            # The ends as they are: between a number and one that is not finite there is nothing.
            parameter.copy_(new if scale == 1 else old if scale == 0 else torch.lerp(old, new, scale))
        value: float = of_first(measure())  # by numbers that differ in their last digit processes would part
        return value if math.isfinite(value) else math.inf

    try:
        return _within(limit, at, finite, tolerance, trials)
    except BaseException:
        for parameter, new in zip(parameters, after, strict=True):
            parameter.copy_(new)
        raise


def _within(
    limit: float, at: Callable[[float], float], finite: bool, tolerance: float, trials: int
) -> tuple[float, float]:
    over, found = 1.0, at(1.0)
    if found <= limit:
        return 1.0, found
    within, best = 0.0, at(0.0)
    if best > limit or not finite:
        return 0.0, best
    start, aim = best, (1 - tolerance / 2) * limit
    known = [(1.0, found - start)]
    for trial in range(trials):
        scale = _crossing(aim - start, known[-2:])
        if trial % 3 == 2 or not within < scale < over:
            scale = (within + over) / 2
        value = at(scale)
        known.append((scale, value - start))
        if value > limit:
            over = scale
        else:
            within, best = scale, value
            if best >= (1 - tolerance) * limit:
                break
    if scale != within:  # the last one measured was not the best
        at(within)
    return within, best


def _crossing(height: float, points: Sequence[tuple[float, float]]) -> float:
    """Where a curve from the origin through the points reaches the height; NaN if nowhere.

    ``a s + b s^2``, with ``a`` 0 where there is one point; where the last of two is far from the height, ``c s^p``.
    """
    if len(points) == 1:
        ((s, value),) = points
        return s * math.sqrt(height / value) if height > 0 else math.nan
    (s, low), (t, high) = points
    if not (math.isfinite(low) and math.isfinite(high)):
        return math.nan
    far = not height / 4 < high < 4 * height
    if far and min(height, low, high) > 0 and low != high:
        power = (math.log(low) - math.log(high)) / math.log(s / t)
        shift = math.log(height) - math.log(high)
        return t * math.exp(min(shift / power, 100.0)) if power > 0 else math.nan
    b = (high / t - low / s) / (t - s)
    a = low / s - b * s
    root = a * a + 4 * b * height
    return 2 * height / (a + math.sqrt(root)) if root >= 0 and a + math.sqrt(root) > 0 else math.nan
