"""Anchors: a penalty that protects what earlier tasks have learned, without their data."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.ewc import drawn_gradients
from curlora.continual.errors import RunError
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.drawn import answering, diverged, examples_of, trained
from curlora.continual.task_model import TaskModel
from curlora.guard import Anchors, GuardError

__all__ = ["AnchorsPlugin"]


class AnchorsPlugin(Plugin):
    """Adds ``strength`` times the predicted divergence of earlier tasks' answers to the loss of every step.

    See :class:`curlora.guard.anchors.Anchors`. The divergence is in nats per answer, summed over earlier tasks. With a
    strength of 1, each earlier task has the same weight as the current one.

    Args:
        strength: factor of the penalty relative to the mean loss of a batch.
        examples: number of training examples of each task from which its moments are estimated; all if the task has
            fewer.

    Raises:
        ValueError: if ``strength`` or ``examples`` is not positive.
    """

    only_for: ClassVar[str | None] = "curlora"
    holds_trained: ClassVar[bool] = True

    def __init__(self, strength: float = 1.0, examples: int = 200) -> None:
        self.strength = float(strength)
        if not (self.strength > 0 and math.isfinite(self.strength)) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"anchors needs a positive strength and at least 1 example, got {strength=} {examples=}")
        self.examples = examples
        self.anchors = Anchors()

    def describe(self) -> dict[str, Any]:
        return {"name": "anchors", "strength": self.strength, "examples": self.examples}

    def penalty(self, model: TaskModel) -> Tensor | None:
        lost = self.anchors.penalty(_matrices(model))
        return None if lost is None else self.strength * lost

    def after_task(self, context: TaskContext) -> None:
        if diverged(context.model):
            return
        batches, generator = examples_of(context, self.examples)
        parameters = dict(trained(context.model))
        try:
            with answering(context.model, batches) as answered:
                self.anchors.add(_matrices(context.model), drawn_gradients(parameters, answered, generator))
        except GuardError as error:
            raise RunError(f"plug-in anchors: {error}") from error

    def state_dict(self) -> dict[str, Tensor]:
        return self.anchors.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.anchors.load_state_dict(state)


def _matrices(model: TaskModel) -> dict[str, Tensor]:
    return {name: p for name, p in trained(model) if "curlora_U" in name}
