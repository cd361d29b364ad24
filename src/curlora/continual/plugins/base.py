"""What can be combined with any method: a plug-in on the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import Row

__all__ = ["Plugin", "TaskContext"]


@dataclass(frozen=True)
class TaskContext:
    """A task that begins or has ended.

    Args:
        number: of the task in the stream, from 0.
        model: what is trained.
        rows: the task's own training rows.
        collate: makes a batch of rows.
        seed: of the run.
    """

    number: int
    model: TaskModel
    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    seed: int


class Plugin(TrainerCallback):
    """Does nothing; a plug-in overrides what it needs, the Trainer's own events among it.

    One object serves a whole stream. What it keeps from task to task is in its state, which the run saves after each
    task.
    """

    def describe(self) -> dict[str, Any]:
        """Its name and options, for the report."""
        raise NotImplementedError

    def added_rows(self, task: int) -> int:
        """How many rows :meth:`training_rows` will add to the task of that number."""
        return 0

    def training_rows(self, context: TaskContext) -> Sequence[Row]:
        """The rows that are trained on; the task's own unless overridden."""
        return context.rows

    def penalty(self, model: TaskModel) -> Tensor | None:
        """Added to the loss of every step."""
        return None

    def after_task(self, context: TaskContext) -> None:
        """The task has been learned."""

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
