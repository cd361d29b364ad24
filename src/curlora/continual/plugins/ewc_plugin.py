"""Elastic weight consolidation: a quadratic penalty on changes of the parameters that matter to earlier tasks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.ewc import Consolidated, fisher_diagonal
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.drawn import answering, diverged, examples_of, trained
from curlora.continual.task_model import TaskModel

__all__ = ["EWCPlugin"]


class EWCPlugin(Plugin):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3).

    While task ``k`` is learned, ``strength / 2 * sum_{j<k} sum_i F_j[i] (theta[i] - theta_j[i])**2`` is added to the
    loss. ``F_j`` is the diagonal of the Fisher information on task ``j``, and ``theta_j`` are the trained parameters
    after task ``j``, without heads. The sum over tasks is stored as one quadratic function: two values per trainable
    parameter for any number of tasks.

    Args:
        strength: the paper's lambda, relative to the mean loss of a batch.
        examples: number of training examples of each task from which the Fisher information is estimated; all if the
            task has fewer.

    Raises:
        ValueError: if ``strength`` or ``examples`` is not positive.
    """

    holds_trained: ClassVar[bool] = True

    def __init__(self, strength: float, examples: int = 200) -> None:
        strength = float(strength)  # YAML reads 1e3 as a string
        if not (strength > 0 and math.isfinite(strength)) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"ewc needs a positive strength and at least 1 example, got {strength=} and {examples=}")
        self.strength = strength
        self.examples = examples
        self.held = Consolidated()

    def describe(self) -> dict[str, Any]:
        return {"name": "ewc", "strength": self.strength, "examples": self.examples}

    def penalty(self, model: TaskModel) -> Tensor | None:
        penalty = self.held.penalty(dict(trained(model)))
        return None if penalty is None else self.strength * penalty

    def after_task(self, context: TaskContext) -> None:
        if diverged(context.model):
            return
        batches, generator = examples_of(context, self.examples)
        parameters = dict(trained(context.model))
        with answering(context.model, batches) as answered:
            fisher = fisher_diagonal(parameters, answered, generator)
        self.held.add(parameters, fisher)

    def state_dict(self) -> dict[str, Tensor]:
        return self.held.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.held.load_state_dict(state)
