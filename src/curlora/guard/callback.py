"""The guard in transformers' Trainer, and in TRL's, which are made of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import callbacks_around
from curlora.guard.errors import GuardError
from curlora.guard.guard import Guard
from curlora.guard.scale_back import scale_to_limit
from curlora.tuner.sharded import reshard, whole

__all__ = ["GuardCallback", "Kept", "act_first", "log"]


class Kept(NamedTuple):
    """What was kept of a training: the share of its change, and by how much the measure has risen with it."""

    scale: float
    rise: float


class GuardCallback(TrainerCallback):
    """Puts a guard on the Trainer's optimizer, and the predicted forgetting beside the loss.

    ``drift``, in nats per token, is then in the Trainer's logs, on its progress bar and in the trackers of
    ``report_to``.

    With a ``measure`` the limit holds by measurement as well: after the last step, what the training changed in ``U``
    is scaled back along itself until the measure allows it (:func:`curlora.guard.scale_to_limit`), and :attr:`kept`
    says how far it was. That is before the last evaluation and the last checkpoint; a checkpoint that
    ``load_best_model_at_end`` puts in its place is measured likewise. Whatever else was trained stays as it is, and
    counts. Checkpoints in the course of the training are within the predicted budget only. Make the callback where
    training begins, before a checkpoint is gone on from: what training changed is counted from there, and of a further
    training from where the last one ended.

    Args:
        guard: of the model that is trained.
        measure: of the model as it is at that moment, positive and the lower the better, such as
            :func:`curlora.guard.perplexity` of a text. What it was when the guard was calibrated is what counts as 1.
        max_rise: the most that it may rise by, relatively: 0.01 for 1 %. The guard's ``max_perplexity_increase`` if
            ``None``.

    Raises:
        GuardError: if there is no limit to hold, or it is not positive.
    """

    def __init__(self, guard: Guard, measure: Callable[[], float] | None = None, max_rise: float | None = None) -> None:
        if measure is not None:
            if max_rise is None and guard.budget is not None:
                max_rise = math.expm1(guard.budget)
            if max_rise is None or not (max_rise > 0 and math.isfinite(max_rise)):
                raise GuardError(f"To hold a measure, max_rise must be a positive number, got {max_rise!r}")
        elif max_rise is not None:
            raise GuardError("max_rise is of a measure: give that too, or a budget to the guard")
        self.guard, self.measure, self.max_rise = guard, measure, max_rise
        self.kept: Kept | None = None
        self._before = self._now()
        self._held: list[Tensor] = []
        self._at_start = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        act_first(self)
        self._held = []
        if self.measure is not None and math.isnan(self._at_start):
            with self.guard.as_calibrated():
                self._at_start = self._measured()
            if not (self._at_start > 0 and math.isfinite(self._at_start)):
                raise GuardError(f"The measure must be a positive number, and is {self._at_start} before training")
        self.guard.attach(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # before the last evaluation and checkpoint
            self._hold(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish(state)
        if self.kept is not None:
            log(self, args, state, control, {"kept": self.kept.scale, "rise": self.kept.rise})

    def finish(self, state: TrainerState) -> None:
        """Leave the optimizer alone, and hold the measure where that has not been done since the model changed."""
        self.guard.detach()
        if not (self._held and all(map(_same, self._now(), self._held))):  # stopped early, or the best was loaded
            self._hold(state)
        self._before = self._now()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs["drift"] = state.log_history[-1]["drift"] = self.guard.drift()

    def _hold(self, state: TrainerState) -> None:
        """Scale back what training has changed as far as the measure asks for."""
        if self.measure is None or self.max_rise is None:
            return
        finite = all(bool(U.isfinite().all()) for U in self._now())
        found = scale_to_limit(
            self.max_rise, lambda: self._measured() / self._at_start - 1, self.guard.parameters, self._before
        )
        self.kept = Kept(*found)
        self._held = self._now()
        if not self.kept.scale:
            warnings.warn(self.why(self.kept, finite), stacklevel=2)

    def why(self, kept: Kept, finite: bool) -> str:
        """Why nothing of a training was kept, for people."""
        if not finite:
            return "The training ended in numbers that are not finite: all that it changed in U was taken back"
        if self.max_rise is not None and kept.rise > self.max_rise:
            return (
                f"The measure has risen by {kept.rise:.3g} where {self.max_rise:.3g} is allowed, even with all that "
                "this training changed in U taken back"
            )
        return (
            f"No part of what was learned keeps the measure within a rise of {self.max_rise:.3g}: all that was changed "
            "in U was taken back"
        )

    def count_from(self, before: Sequence[Tensor], at_start: float) -> None:
        """Count what training changes from these values of ``guard.parameters``, and the measure from ``at_start``."""
        self._before, self._at_start = list(before), at_start

    def _now(self) -> list[Tensor]:
        return [whole(U.detach()).clone() for U in self.guard.parameters] if self.measure is not None else []

    def _measured(self) -> float:
        assert self.measure is not None
        value = self.measure()
        reshard(self.guard.model)
        return value


def act_first(callback: TrainerCallback) -> None:
    """Let a callback be called before those of trackers, which read a log as it is when they are called."""
    callbacks = callbacks_around(callback)
    if callbacks is not None:
        callbacks.remove(callback)
        callbacks.insert(0, callback)


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
