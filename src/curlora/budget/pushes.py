"""Checkpoints are kept from the hub and from trackers until the limits are held."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from curlora._compat import hold_uploads

__all__ = ["Pushes"]


class Pushes:
    """Holds back what a Trainer pushes to the hub and what its trackers upload when a checkpoint is saved."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def hold(self, callback: TrainerCallback, args: TrainingArguments) -> None:
        """Let nothing leave this machine until :meth:`release`.

        Args:
            callback: the callback that is being called, by whose Trainer the trackers are found.
            args: the Trainer's arguments, whose ``hub_strategy`` changes for now.
        """
        self.release()  # what an interrupted training has held back, perhaps of another Trainer
        strategy = HubStrategy(args.hub_strategy)
        if args.push_to_hub and strategy != HubStrategy.END:
            warnings.warn(
                f"hub_strategy={strategy.value!r} pushes checkpoints during training, when the limits are not held "
                "yet. Within a budget only the last checkpoint is pushed.",
                stacklevel=4,
            )
            args.hub_strategy = HubStrategy.END
            self._restore.append(lambda: setattr(args, "hub_strategy", strategy))
        self._restore.append(hold_uploads(callback))

    def release(self) -> None:
        """Restore what :meth:`hold` has changed."""
        while self._restore:
            self._restore.pop()()
