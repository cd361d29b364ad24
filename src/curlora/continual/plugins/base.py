"""The interface of a plug-in, which can be combined with any method."""

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
    """A task that is about to be learned or has been learned.

    Args:
        number: the task's number in the stream, from 0.
        model: the model that is trained.
        rows: the task's own training rows.
        collate: makes a batch of rows.
        seed: the run's seed.
        guard_text: the recipe's general text, if it has one.
        base_logits: the function from :meth:`curlora.continual.methods.Method.base_logits`; ``None`` if the method
            trains only heads.
        tasks: the number of tasks in the stream.
        adapter: the name of the adapter that is trained, for methods with adapters.
        adapter_since: the number of the first task that trains this adapter.
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

    @property
    def choice_seed(self) -> int:
        """The seed of a choice among this task's rows or texts: another one for each task of the run."""
        return (self.seed * 1_000_003 + self.number) % 2**63


class Plugin(TrainerCallback):
    """Base class of plug-ins, which does nothing. A plug-in overrides what it needs, also events of the Trainer.

    One object is used for a whole stream. What it keeps from task to task belongs in :meth:`state_dict`, which the run
    saves after each task.
    """

    only_for: ClassVar[str | None] = None
    """The only method that the plug-in can be combined with; any if ``None``."""
    for_heads: ClassVar[bool] = False
    """Whether the plug-in can be used when only heads are trained."""
    needs_guard_text: ClassVar[bool] = False
    """Whether the plug-in needs the recipe's ``guard`` text."""
    changes_start: ClassVar[bool] = False
    """Whether :meth:`before_task` changes the model. The model is then saved before training starts."""
    holds_trained: ClassVar[bool] = False
    """Whether the plug-in keeps later tasks from changing the parameters that earlier tasks have trained."""

    def describe(self) -> dict[str, Any]:
        """Return the plug-in's name and options for the report."""
        raise NotImplementedError

    def added_rows(self, task: int) -> int:
        """Return the number of rows that :meth:`training_rows` will add to task number ``task``."""
        return 0

    def before_task(self, context: TaskContext) -> None:
        """Called before a task is learned, also when a run is resumed within the task."""

    def training_rows(self, context: TaskContext) -> Sequence[Row]:
        """Return the rows that are trained on; the task's own unless overridden."""
        return context.rows

    def penalty(self, model: TaskModel) -> Tensor | None:
        """Return a scalar that is added to the loss of every step, or ``None``."""
        return None

    def drift(self) -> float | None:
        """Return the predicted drift in nats per token, which is logged with the loss, or ``None``."""
        return None

    def after_task(self, context: TaskContext) -> Guarded | None:
        """Called after a task was learned. A plug-in that keeps a limit returns how it was kept."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that is kept from task to task."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state that :meth:`state_dict` returned."""
