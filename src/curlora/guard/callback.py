"""The guard in transformers' Trainer, and in TRL's, which are made of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora.guard.errors import GuardError
from curlora.guard.guard import Guard
from curlora.guard.scale_back import scale_to_limit
from curlora.tuner.sharded import reshard, whole

__all__ = ["GuardCallback", "Kept"]


class Kept(NamedTuple):
    """What was kept of a training: the share of its change, and by how much the measure has risen with it."""

    scale: float
    rise: float


class GuardCallback(TrainerCallback):
    """Puts a guard on the Trainer's optimizer, and the predicted forgetting beside the loss.

    ``drift``, in nats per token, is then in the Trainer's logs, ``trainer.state.log_history``. Trackers that were added
    by ``report_to`` read the logs before any callback of a user's, and do not see it.

    With a ``measure`` the limit holds by measurement as well: when training has ended, what it changed in ``U`` is
    scaled back along itself until the measure allows it (:func:`curlora.guard.scale_to_limit`), and :attr:`kept`
    says how far it was. Whatever else was trained stays as it is, and counts. Checkpoints of the training are from
    before that; save the model after ``train``. Make the callback where training begins, before a checkpoint is
    gone on from: what training changed is counted from there, and of a further training from where the last one
    ended.

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
        self._at_start = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.measure is not None:
            with self.guard.as_calibrated():
                self._at_start = self._measured()
            if not (self._at_start > 0 and math.isfinite(self._at_start)):
                raise GuardError(f"The measure must be a positive number, and is {self._at_start} before training")
        self.guard.attach(kwargs["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.guard.detach()
        if self.measure is None or self.max_rise is None:
            return
        finite = all(bool(U.isfinite().all()) for U in self._now())
        found = scale_to_limit(
            self.max_rise, lambda: self._measured() / self._at_start - 1, self.guard.parameters, self._before
        )
        self.kept = Kept(*found)
        state.log_history.append({"kept": self.kept.scale, "rise": self.kept.rise, "step": state.global_step})
        self._before = self._now()
        if self.kept.scale:
            return
        if not finite:
            why = "The training ended in numbers that are not finite: all that it changed in U was taken back"
        elif self.kept.rise > self.max_rise:
            why = (
                f"The measure has risen by {self.kept.rise:.3g} where {self.max_rise:.3g} is allowed, even with all "
                "that this training changed in U taken back"
            )
        else:
            why = (
                f"No part of what was learned keeps the measure within a rise of {self.max_rise:.3g}: all that was "
                "changed in U was taken back"
            )
        warnings.warn(why, stacklevel=2)

    def _now(self) -> list[Tensor]:
        return [whole(U.detach()).clone() for U in self.guard.parameters] if self.measure is not None else []

    def _measured(self) -> float:
        assert self.measure is not None
        value = self.measure()
        reshard(self.guard.model)
        return value

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"]["drift"] = state.log_history[-1]["drift"] = self.guard.drift()
