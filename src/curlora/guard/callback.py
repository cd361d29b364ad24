"""The guard in transformers' Trainer, and in TRL's, which are made of it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora.guard.guard import Guard

__all__ = ["GuardCallback"]


class GuardCallback(TrainerCallback):
    """Puts a guard on the Trainer's optimizer, and the predicted forgetting beside the loss.

    ``drift``, in nats per token, is then in the Trainer's logs, ``trainer.state.log_history``. Trackers that were added
    by ``report_to`` read the logs before any callback of a user's, and do not see it.

    Args:
        guard: of the model that is trained.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.guard.attach(kwargs["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.guard.detach()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"]["drift"] = state.log_history[-1]["drift"] = self.guard.drift()
