"""Keep a limit by measurement: scale a change of the parameters back until a measure is within the limit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curlora.text.processes import in_all, of_first
from curlora.tuner.sharded import laid_out_like, whole

__all__ = ["scale_to_limit", "with_values"]


@contextlib.contextmanager
def with_values(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Set parameters to other values, and restore them afterwards."""
    now = [parameter.detach().clone() for parameter in parameters]

    def assign(to: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, to, strict=True):
                # FSDP2 may have sharded the parameter since.
                parameter.copy_(laid_out_like(value, parameter).to(device=parameter.device, dtype=parameter.dtype))

    try:
        assign(values)
        yield
    finally:
        assign(now)


@torch.no_grad()
def scale_to_limit(
    limit: float,
    measure: Callable[[], float],
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    tolerance: float = 0.05,
    trials: int = 10,
) -> tuple[float, float]:
    """Scale the change from ``before`` to the current ``parameters`` back, until ``measure`` is within ``limit``.

    The search keeps one scale that was measured to be within the limit, and one that was not. The next scale between
    them is where a parabola through the start and the last two points reaches the limit, or a power law if the last
    point is far from the limit. Every third trial bisects instead. The result is always a point that was measured to be
    within the limit, whatever the curve.

    With ``torch.distributed``, every process has to call this function. All processes use the first one's measurement:
    values that differ in the last digit would send them different ways. If ``measure`` raises in
    one of them, it raises in all, and the parameters are restored.

    Args:
        limit: the largest allowed value of ``measure``, positive.
        measure: measures the model with the current parameters. A value that is not finite counts as over the limit.
        parameters: the parameters, which are set to the result in place.
        before: their values before the change.
        tolerance: the share of the limit that may remain unused.
        trials: the largest number of measurements between the two ends, which are measured as well.

    Returns:
        The scale, and the value of ``measure`` at this scale. The scale is 1 if the whole change was kept, and 0 if all
        of it was taken back. The value is above the limit only if it was so before the change.
    """
    after = [parameter.detach().clone() for parameter in parameters]
    finite = all(bool(whole(new).isfinite().all()) for new in after)
    # FSDP2 may have sharded the parameters since.
    before = [
        laid_out_like(old, new).to(device=new.device, dtype=new.dtype) for old, new in zip(before, after, strict=True)
    ]

    def at(scale: float) -> float:
        for parameter, old, new in zip(parameters, before, after, strict=True):
            # The ends are copied, because lerp gives NaN at scale 0 if the new value is not finite.
            parameter.copy_(new if scale == 1 else old if scale == 0 else torch.lerp(old, new, scale))
        value: float = of_first(in_all(measure))
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
    if finite and found <= limit:  # an expert that the measured text does not reach can be NaN unnoticed
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
    if scale != within:  # the parameters are at the last scale, which was over the limit
        at(within)
    return within, best


def _crossing(height: float, points: Sequence[tuple[float, float]]) -> float:
    """Return where a curve through the origin and the points reaches the height; NaN if it does not.

    With one point the curve is ``b s^2``, and with two it is ``a s + b s^2``. If the second point is far from the
    height, the curve is ``c s^p``.

    Args:
        height: the value to reach.
        points: one or two pairs of a scale and the value there.
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
