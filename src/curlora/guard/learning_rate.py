"""The learning rate of a guarded training."""

from __future__ import annotations

import math

from curlora.guard.errors import GuardError

__all__ = ["learning_rate"]

# Fitted to benchmarks/guard/learning_rate.jsonl; what they cost there is in docs/guard.md.
_RATE, _BUDGET, _STEPS, _RANK = 0.1, 0.01, 60, 32
_WIDE = 0.1  # nats: a wider budget holds no step back
_MOST = 3.0  # square roots of the budget: beyond it every step begins anew


def learning_rate(budget: float, steps: int, r: int) -> float:
    """A learning rate for Adam and the like on a guarded adapter, in square roots of nats.

    ``0.1 * sqrt(0.01 / budget * 32 / r) * (60 / steps) ** 0.25``, where a budget above 0.1 nats counts as 0.1, and at
    most ``3 * sqrt(budget)``.

    In the guard's coordinates the predicted divergence is ``mean(V^2)``, and Adam's first step moves every entry of
    ``V`` by the rate. A narrow budget bears a higher rate than a wide one, and gains by it: steps that would leave the
    ball are scaled back onto it, whereas in a wide one they are taken as they are, and the same rate is too much.

    The constants are fitted to short trainings of SmolLM2-135M (16 settings: 20 to 240 steps, 0.002 to 0.1 nats, ranks
    32 and 128). The held-out loss at the rule's rate was 0.008 nats above the best rate's on average and 0.029 at
    most, where a fixed rate of 0.06 was 0.022 and 0.076 above. Beyond these settings it is an extrapolation.

    Args:
        budget: in nats per token, as :class:`curlora.Guard` has it.
        steps: of the optimizer, in the whole training.
        r: the adapter's rank.

    Raises:
        GuardError: if one of them is not positive and finite.
    """
    if not all(value > 0 and math.isfinite(value) for value in (budget, steps, r)):
        raise GuardError(f"budget, steps and r must be positive, got {budget}, {steps} and {r}")
    rate = _RATE * math.sqrt(_BUDGET / min(budget, _WIDE) * _RANK / r) * (_STEPS / steps) ** 0.25
    return min(rate, _MOST * math.sqrt(budget))
