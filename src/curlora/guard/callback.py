"""The guard in transformers' Trainer, and in TRL's, which are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import callbacks_around
from curlora.guard.errors import GuardError
from curlora.guard.guard import Guard
from curlora.guard.measured_limit import MeasuredLimit

__all__ = ["GuardCallback", "act_first"]


class GuardCallback(MeasuredLimit):
    """Puts a guard on the Trainer's optimizer, and the predicted forgetting beside the loss.

    ``drift``, in nats per token, is then in the Trainer's logs, on its progress bar and in the trackers of
    ``report_to``.

    With a ``measure`` the limit holds by measurement as well: after the last step, what the training changed in ``U``
    is scaled back along itself until the measure allows it (:func:`curlora.guard.scale_to_limit`), and ``kept``
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
        if measure is None and max_rise is not None:
            raise GuardError("max_rise is of a measure: give that too, or a budget to the guard.")
        if measure is not None and max_rise is None and guard.budget is not None:
            max_rise = math.expm1(guard.budget)
        self.guard = guard
        super().__init__(guard.model, lambda: guard.parameters, measure, max_rise)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        act_first(self)
        if self.measure is not None and math.isnan(self.at_start):
            with self.guard.as_calibrated():
                self.measure_start()
        self.guard.attach(kwargs["optimizer"])

    def finish(self) -> None:
        self.guard.detach()
        super().finish()

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


def act_first(callback: TrainerCallback) -> None:
    """Let a callback be called before those of trackers, which read a log as it is when they are called."""
    callbacks = callbacks_around(callback)
    if callbacks is not None:
        callbacks.remove(callback)
        callbacks.insert(0, callback)
