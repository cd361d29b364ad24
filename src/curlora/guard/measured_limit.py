"""A callback that keeps a measured limit: at the end of a training it scales the change of the parameters back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import callbacks_around
from curlora.errors import GuardError
from curlora.guard.scale_back import scale_to_limit, with_values
from curlora.text.processes import rank_and_count
from curlora.tuner.sharded import reshard, whole

__all__ = ["Kept", "MeasuredLimit", "NothingKeptWarning", "log"]


class NothingKeptWarning(UserWarning):
    """Nothing is left of a training: its whole change was taken back."""


class Kept(NamedTuple):
    """The share of a training's change that was kept, and the relative rise of the measure with it.

    Args:
        scale: the share, 0 to 1; 1 if the limit held without scaling back.
        rise: the rise relative to the measure before the first training: 0.01 for 1 %.
    """

    scale: float
    rise: float


class MeasuredLimit(TrainerCallback):
    """Keeps the rise of a measure over a training within a limit.

    After the last step, the parameters are moved back on the straight line to their values before training, until the
    measure is within the limit (:func:`curlora.guard.scale_to_limit`). This happens before the last evaluation and the
    last checkpoint. It happens again after training if the parameters have changed since: training was stopped early,
    or the best checkpoint was loaded. :attr:`kept` holds the share of the change that remains.

    If the measure raises an error after the last step, the trained parameters are saved as a checkpoint, unless only
    the best ones are saved (``save_strategy="best"``). Then a :class:`GuardError` is raised. The training can be
    resumed from the checkpoint once the measure works.

    For a further training, the change is counted from the end of the last one. The rise of the measure is always
    counted from before the first training.

    Args:
        model: the trained model.
        parameters: returns the parameters that are moved back, as they are currently in the model.
        measure: measures the current model. The value is positive, and lower is better. ``None`` for no limit.
        max_rise: the largest allowed relative rise of the measure: 0.01 for 1 %.
        at_start: the value from which the rise is counted, if it is known. It is measured when training begins if NaN.

    Raises:
        GuardError: if there is a ``measure`` and ``max_rise`` is not positive and finite.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], Sequence[Tensor]],
        measure: Callable[[], float] | None,
        max_rise: float | None,
        at_start: float = math.nan,
    ) -> None:
        if measure is not None and not (max_rise is not None and max_rise > 0 and math.isfinite(max_rise)):
            raise GuardError(f"max_rise must be a positive number, such as 0.01 for 1 %, got {max_rise!r}.")
        self.measure, self.max_rise, self.at_start = measure, max_rise, at_start
        self.kept: Kept | None = None
        self._model, self._moved = model, parameters
        self._left: list[Tensor] = []
        self._failure: Exception | None = None  # after the last step
        self.count_from(self.values())

    def as_before(self) -> AbstractContextManager[None]:
        """Set the parameters to the values from which the rise is counted, for the duration of a ``with`` statement."""
        return with_values(self._moved(), self._before)

    def _measure_start(self) -> None:
        with self.as_before():
            self.at_start = self._measured()
        if not (self.at_start > 0 and math.isfinite(self.at_start)):
            raise GuardError(
                f"The measure must be a positive, finite number, and is {self.at_start} before training. Check the "
                "measure and the model."
            )

    def count_from(self, before: Sequence[Tensor]) -> None:
        """Count the training's change from these values of the parameters."""
        self._before = list(before)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.kept, self._left, self._failure = None, [], None
        # The trainer has prepared the model by now: both measurements are in the precision of its autocast.
        if self.measure is not None and math.isnan(self.at_start):
            self._measure_start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # before the last evaluation and checkpoint
            try:
                self._hold()
            except Exception as error:  # the user's measure may raise anything
                self.save_before_raising(error, control)

    def save_before_raising(self, error: Exception, control: TrainerControl) -> None:
        """Have the trained parameters saved as a checkpoint, and then raise an error that names this one."""
        self._failure = error
        control.should_save = True

    @property
    def failed(self) -> bool:
        """Whether the work after the last step has failed, and this has not been reported yet."""
        return self._failure is not None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report(
            f"The trained parameters are in checkpoint-{state.global_step} of {args.output_dir}. Correct the "
            "cause, and resume from there (resume_from_checkpoint): the limits are held then."
        )

    def _report(self, saved: str) -> None:
        """Raise the error of the work after the last step, if there was one.

        Args:
            saved: sentences on where the trained parameters are.
        """
        if (failure := self._failure) is None:
            return
        self._failure = None
        if rank_and_count()[1] > 1:
            torch.distributed.barrier()  # the first process may still be writing the checkpoint
        raise GuardError(
            f"Measuring the limits after the last step failed with {type(failure).__name__}: {failure}. {saved}"
        ) from failure

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish()
        if self.kept is not None:
            log(self, args, state, control, {"kept": self.kept.scale, "rise": self.kept.rise})

    def finish(self) -> None:
        """Scale back once more if the parameters have changed since the last time."""
        self._report("The trained parameters are in the model, not scaled back: save them with save_model().")
        if not (self._left and self.unchanged(self._left)):
            self._hold()
        self.count_from(self.values())
        self._left = []

    def unchanged(self, since: Sequence[Tensor]) -> bool:
        """Return whether the parameters have these values, on whatever device."""
        now = self.values()
        return len(now) == len(since) and all(map(_same, now, since))

    def why_nothing(self, kept: Kept, finite: bool) -> str:
        """Return a warning message that explains why nothing of the training was kept."""
        if not finite:
            return (
                "Parameters are not finite after training, so the whole change was taken back. Lower the learning "
                "rate, or train in bfloat16 or float32."
            )
        if self.max_rise is not None and kept.rise > self.max_rise:
            return (
                f"The measure has risen by {kept.rise:.3g} where {self.max_rise:.3g} is allowed, although the whole "
                "change of this training was taken back: other parameters or an earlier training have raised it."
            )
        return (
            f"No part of the change keeps the rise of the measure within {self.max_rise:.3g}, so the whole change was "
            "taken back. Allow a larger rise, or lower the learning rate."
        )

    def _hold(self) -> None:
        if self.measure is None or self.max_rise is None:
            return
        finite = all(bool(parameter.isfinite().all()) for parameter in self.values())
        rise = lambda: self._measured() / self.at_start - 1  # noqa: E731
        self.kept = Kept(*scale_to_limit(self.max_rise, rise, self._moved(), self._before))
        self._left = self.values()
        if not self.kept.scale:
            warnings.warn(self.why_nothing(self.kept, finite), NothingKeptWarning, stacklevel=2)

    def values(self) -> list[Tensor]:
        """Return the parameters' values, whole, for :meth:`unchanged`; every process must call this."""
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
    """Add values to the Trainer's log history, and pass them to its other callbacks: trackers and progress bar."""
    state.log_history.append({**logs, "step": state.global_step})
    for other in callbacks_around(callback) or []:
        if other is not callback:
            other.on_log(args, state, control, logs=dict(logs))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.device), other)
