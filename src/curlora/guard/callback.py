"""The guard as a callback for transformers' Trainer and for TRL's trainers, which are subclasses of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora._compat import callbacks_around
from curlora.errors import GuardError
from curlora.guard.guard import Guard
from curlora.guard.measured_limit import MeasuredLimit

__all__ = ["GuardCallback", "act_first"]


class GuardCallback(MeasuredLimit):
    """Attaches a guard to the Trainer's optimizer, and logs the predicted forgetting beside the loss.

    The logs hold ``drift``, the predicted KL divergence in nats per token. It appears on the progress bar and in the
    trackers of ``report_to`` as well.

    With a ``measure``, the limit also holds by measurement. After the last step, the training's change of ``U`` is
    scaled back until the measure is within the limit (:func:`curlora.guard.scale_to_limit`). ``kept`` holds the share
    of the change that remains. This happens before the last evaluation and the last checkpoint. If
    ``load_best_model_at_end`` then loads another checkpoint, that one is measured and scaled back as well.

    Other trained parameters are not scaled back, but the measure includes their effect. Checkpoints during the training
    are within the predicted budget only. Make the callback before training begins, and before a checkpoint is loaded to
    resume from. The change is counted from the values of ``U`` at that moment; for a further training, from the end of
    the last one.

    Args:
        guard: the guard of the trained model.
        measure: measures the current model. The value is positive, and lower is better, such as
            :func:`curlora.guard.perplexity` of a text. The rise is relative to the value of the calibrated model.
        max_rise: the largest allowed relative rise of the measure: 0.01 for 1 %. If ``None``, that of the guard's
            budget, ``exp(budget) - 1``.
        at_start: the value from which the rise is counted, if it is known. It is measured when training begins if NaN.

    Raises:
        GuardError: if ``max_rise`` is given without a ``measure``, if a ``measure`` is given without a limit, or if the
            limit is not positive.
    """

    def __init__(
        self,
        guard: Guard,
        measure: Callable[[], float] | None = None,
        max_rise: float | None = None,
        at_start: float = math.nan,
    ) -> None:
        if measure is None and max_rise is not None:
            raise GuardError(
                f"max_rise={max_rise!r} is the limit of a measure, and no measure was given: pass measure=... as well, "
                "or give the guard a budget instead."
            )
        if measure is not None and max_rise is None and guard.budget is not None:
            max_rise = math.expm1(guard.budget)
        self.guard = guard
        super().__init__(guard.model, lambda: guard.parameters, measure, max_rise, at_start)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        act_first(self)
        self.guard.attach(kwargs["optimizer"])

    def as_before(self) -> AbstractContextManager[None]:
        return self.guard.as_calibrated()

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
    """Move a callback to the front, so that trackers, which are called later, see what it adds to the logs."""
    callbacks = callbacks_around(callback)
    if callbacks is not None:
        callbacks.remove(callback)
        callbacks.insert(0, callback)
