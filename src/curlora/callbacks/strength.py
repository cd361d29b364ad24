"""The strength of a penalty on a divergence: constant, or as high as it takes to train within a limit."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import TrainerState

__all__ = ["AIM", "Strength"]

AIM = 0.8
"""The share of the limit above which the strength rises. The rest is left for the steps' noise."""

_MEMORY = 0.9  # of the mean of the steps' divergences: about ten steps, each of which measures one row of text
_GAIN = 16.0  # at the highest rate of change the strength reaches exp(_GAIN) times its start's in a training


class Strength:
    """The strength of a penalty on a divergence.

    Without a limit the strength is constant. With a limit it is ``start`` as long as the mean divergence ``d`` of the
    last steps is below the aim ``a``, which is 0.8 of the limit. Above the aim the strength is
    ``start * exp(s) * max(1, d / a)``. Each step adds ``16 / steps * log(d / a)`` to ``s``, where the logarithm is kept
    between -1 and 1; ``s`` never falls below 0. The factor ``exp(s)`` is dual ascent on the constraint
    ``log d <= log a`` for the logarithm of the strength, and ``d / a`` acts at once, as the quadratic term of an
    augmented Lagrangian does (Bertsekas 1982, Constrained Optimization and Lagrange Multiplier Methods).

    The limit is not a goal: a weaker penalty would forget more, and learn hardly more (docs/proof.md).

    Args:
        start: the strength at first, and the lowest.
        limit: the largest divergence, in nats per token. ``None`` for a constant strength.
        name: the name under which the Trainer's checkpoints keep its state.

    Raises:
        ValueError: if the strength or the limit is not positive.
    """

    def __init__(self, start: float, limit: float | None = None, name: str = "strength of the penalty") -> None:
        for option, value in (("strength", start), ("max_kl", limit)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{option} must be positive, got {value}.")
        self.start, self.limit, self.name = float(start), limit, name
        self.mean: float | None = None
        """The mean divergence of the last steps, in nats per token; ``None`` before the first step."""
        self._raised = 0.0
        self._last: list[float] = []

    @property
    def value(self) -> float:
        """The strength of the next step."""
        if self.limit is None or self.mean is None:
            return self.start
        return self.start * math.exp(self._raised) * max(1.0, self.mean / (AIM * self.limit))

    def of(self, divergence: Tensor) -> Tensor:
        """Return the penalty on a divergence, a scalar tensor in nats per token, and count it for the next step."""
        self._last.append(float(divergence.detach()))
        return self.value * divergence

    def begin(self, state: TrainerState) -> None:
        """Start anew, or where the Trainer's checkpoint was if the training resumes."""
        kept = state.stateful_callbacks.get(self.name) if state.global_step else None
        self.mean, self._raised = (None, 0.0) if kept is None else (kept["mean"], kept["raised"])
        self._last = []

    def step(self, state: TrainerState) -> None:
        """Set the strength of the next step. Called after each step of the optimizer."""
        found = [value for value in self._last if math.isfinite(value)]
        self._last = []
        if self.limit is None or not found:
            return
        mean = sum(found) / len(found)
        self.mean = mean if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * mean
        excess = math.log(max(self.mean, 0.1 * self.limit) / (AIM * self.limit))
        self._raised = max(0.0, self._raised + _GAIN / state.max_steps * max(-1.0, min(1.0, excess)))
        state.stateful_callbacks[self.name] = {"mean": self.mean, "raised": self._raised}  # saved by the Trainer
