"""A measured limit in transformers' Trainer: held at the end of a training, by scaling back what it has changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import callbacks_around
from curlora.guard.errors import GuardError
from curlora.guard.scale_back import scale_to_limit
from curlora.tuner.sharded import reshard, whole

__all__ = ["Kept", "MeasuredLimit", "log"]


class Kept(NamedTuple):
    """What was kept of a training: the share of its change, and by how much the measure has risen with it."""

    scale: float
    rise: float


class MeasuredLimit(TrainerCallback):
    """Lets a measure rise no more than is allowed over a training.

    After the last step, before the last evaluation and the last checkpoint, what the training changed is moved back
    along the straight line to where it began, until the measure allows it (:func:`curlora.guard.scale_to_limit`). This
    is done again after training where the parameters are not as that left them: training was stopped early, or the best
    checkpoint was loaded. :attr:`kept` says how much was kept. A further training counts from where the last one ended,
    and the measure counts from the beginning for good.

    Args:
        model: that is trained.
        parameters: gives those that are moved back, as they are in the model at that moment.
        measure: of the model as it is at that moment, positive and the lower the better; ``None`` to hold nothing.
        max_rise: the most that it may rise by, relatively: 0.01 for 1 %.

    Raises:
        GuardError: if ``max_rise`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], Sequence[Tensor]],
        measure: Callable[[], float] | None,
        max_rise: float | None,
    ) -> None:
        if measure is not None and not (max_rise is not None and max_rise > 0 and math.isfinite(max_rise)):
            raise GuardError(f"max_rise must be a positive number, such as 0.01 for 1 %, got {max_rise!r}.")
        self.measure, self.max_rise = measure, max_rise
        self.at_start = math.nan
        self.kept: Kept | None = None
        self._model, self._moved = model, parameters
        self._left: list[Tensor] = []
        self.count_from(self._now())

    def measure_start(self) -> None:
        """Measure what the rise is counted from.

        Raises:
            GuardError: if that is not a positive number.
        """
        self.at_start = self._measured()
        if not (self.at_start > 0 and math.isfinite(self.at_start)):
            raise GuardError(f"The measure must be a positive number, and is {self.at_start} before training.")

    def count_from(self, before: Sequence[Tensor]) -> None:
        """Count what training changes from these values of the parameters."""
        self._before = list(before)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.kept, self._left = None, []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # before the last evaluation and checkpoint
            self._hold()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish()
        if self.kept is not None:
            log(self, args, state, control, {"kept": self.kept.scale, "rise": self.kept.rise})

    def finish(self) -> None:
        """Hold the measure where that has not been done since the parameters changed."""
        if not (self._left and all(map(_same, self._now(), self._left))):
            self._hold()
        self.count_from(self._now())
        self._left = []

    def why_nothing(self, kept: Kept, finite: bool) -> str:
        """Why nothing of a training was kept, for people."""
        if not finite:
            return "The training ended in numbers that are not finite: all that it changed was taken back."
        if self.max_rise is not None and kept.rise > self.max_rise:
            return (
                f"The measure has risen by {kept.rise:.3g} where {self.max_rise:.3g} is allowed, even with all that "
                "this training changed taken back."
            )
        return (
            f"No part of what was learned keeps the measure within a rise of {self.max_rise:.3g}: all that was changed "
            "was taken back."
        )

    def _hold(self) -> None:
        if self.measure is None or self.max_rise is None:
            return
        finite = all(bool(parameter.isfinite().all()) for parameter in self._now())
        rise = lambda: self._measured() / self.at_start - 1  # noqa: E731
        self.kept = Kept(*scale_to_limit(self.max_rise, rise, self._moved(), self._before))
        self._left = self._now()
        if not self.kept.scale:
            warnings.warn(self.why_nothing(self.kept, finite), stacklevel=2)

    def _now(self) -> list[Tensor]:
        return [] if self.measure is None else [whole(parameter.detach()).clone() for parameter in self._moved()]

    def _measured(self) -> float:
        assert self.measure is not None
        value = self.measure()
        reshard(self._model)
        return value


def log(
    callback: TrainerCallback,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    logs: Mapping[str, float],
) -> None:
    """Add figures to the Trainer's history, and hand them to its other callbacks: trackers and the progress bar."""
    state.log_history.append({**logs, "step": state.global_step})
    for other in callbacks_around(callback) or []:
        if other is not callback:
            other.on_log(args, state, control, logs=dict(logs))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.device), other)
