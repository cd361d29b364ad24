"""The default learning rate of a guarded training."""

from __future__ import annotations

import math

from curlora.errors import GuardError

__all__ = ["learning_rate"]

# Fitted to benchmarks/guard/learning_rate.jsonl; docs/guard.md gives the loss compared with the best rates.
_RATE, _BUDGET, _STEPS, _RANK = 0.1, 0.01, 60, 32
_WIDE = 0.1  # nats; a wider budget does not limit the steps
_MOST = 3.0  # times the square root of the budget; at a higher rate each step discards the ones before


def learning_rate(budget: float, steps: int, r: int) -> float:
    """Return a learning rate for Adam and similar optimizers on a guarded adapter, in square roots of nats.

    The rule is ``0.1 * sqrt(0.01 / budget * 32 / r) * (60 / steps) ** 0.25``, at most ``3 * sqrt(budget)``. In the
    first term, a budget above 0.1 nats is replaced by 0.1.

    In the guard's coordinates ``V`` the predicted divergence is ``mean(V^2)``, and Adam's first step moves every entry
    of ``V`` by the learning rate. A narrow budget allows a higher rate than a wide one, and benefits from it. With a
    narrow budget, the guard scales steps back to the limit. A wide budget leaves the same steps unscaled, and they are
    too large.

    The constants are fitted to short trainings of SmolLM2-135M (20 to 240 steps, 0.002 to 0.1 nats, ranks 32 and 128).
    Settings that were tried later, with ranks from 8 and up to 1,000 steps, confirm that the loss at this rate is near
    the least, but a fixed rate of 0.06 does as well there: docs/guard.md has the figures. For other models the rule is
    an extrapolation.

    Args:
        budget: the guard's budget in nats per token, see :class:`curlora.Guard`.
        steps: the number of optimizer steps in the whole training.
        r: the adapter's rank.

    Raises:
        GuardError: if an argument is not positive and finite.
    """
    if not all(value > 0 and math.isfinite(value) for value in (budget, steps, r)):
        raise GuardError(f"budget, steps and r must be positive, got {budget}, {steps} and {r}.")
    rate = _RATE * math.sqrt(_BUDGET / min(budget, _WIDE) * _RANK / r) * (_STEPS / steps) ** 0.25
    return min(rate, _MOST * math.sqrt(budget))
