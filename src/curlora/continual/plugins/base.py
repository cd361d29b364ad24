"""What can be combined with any method: a plug-in on the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import TrainerCallback

from curlora.continual.heldout import HeldOut
from curlora.continual.results import Guarded
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
        guard_text: the recipe's general text, where it has one.
        base_logits: of the base model, as :meth:`curlora.continual.methods.Method.base_logits` gives them; ``None``
            where the base model is all there is.
        tasks: how many the stream has.
        adapter: that is trained, of a method with adapters.
        adapter_since: the number of the task that this adapter begins with.
    """

    number: int
    model: TaskModel
    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    seed: int
    guard_text: HeldOut | None = None
    base_logits: Callable[[Tensor, int], Tensor] | None = None
    tasks: int = 1
    adapter: str = "default"
    adapter_since: int = 0


class Plugin(TrainerCallback):
    """Does nothing; a plug-in overrides what it needs, the Trainer's own events among it.

    One object serves a whole stream. What it keeps from task to task is in its state, which the run saves after each
    task.
    """

    only_for: ClassVar[str | None] = None
    """The one method that it can be combined with; any if ``None``."""
    for_heads: ClassVar[bool] = False
    """Whether it does something where heads are all that is trained."""
    needs_guard_text: ClassVar[bool] = False
    changes_start: ClassVar[bool] = False
    """Whether :meth:`before_task` changes the model: then it is saved as it is after that."""
    holds_trained: ClassVar[bool] = False
    """Whether it keeps later tasks from changing what earlier ones have trained."""

    def describe(self) -> dict[str, Any]:
        """Its name and options, for the report."""
        raise NotImplementedError

    def added_rows(self, task: int) -> int:
        """How many rows :meth:`training_rows` will add to the task of that number."""
        return 0

    def before_task(self, context: TaskContext) -> None:
        """The task is about to be learned; also where a run that was cut off in the course of it goes on."""

    def training_rows(self, context: TaskContext) -> Sequence[Row]:
        """The rows that are trained on; the task's own unless overridden."""
        return context.rows

    def penalty(self, model: TaskModel) -> Tensor | None:
        """Added to the loss of every step."""
        return None

    def drift(self) -> float | None:
        """The forgetting that it predicts, in nats per token, to be logged beside the loss."""
        return None

    def after_task(self, context: TaskContext) -> Guarded | None:
        """The task has been learned. A plug-in that keeps a budget says how."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
