"""Elastic weight consolidation: what mattered to earlier tasks is held where it was."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.ewc import Consolidated, fisher_diagonal
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.drawn import answering, diverged, examples_of, trained
from curlora.continual.task_model import TaskModel

__all__ = ["EWC"]


class EWC(Plugin):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3).

    While task ``k`` is learned, ``strength / 2 * sum_{j<k} sum_i F_j[i] (theta[i] - theta_j[i])**2`` is added to the
    loss, with ``F_j`` the diagonal of the Fisher information on task ``j``, and ``theta_j`` what was trained then,
    heads excepted. The sum over tasks is held as one quadratic: two numbers for each trained one, however many tasks.

    Args:
        strength: the paper's lambda, beside the mean loss of a batch.
        examples: of each task's training split that the Fisher information is taken from; all where it has fewer.

    Raises:
        ValueError: if ``strength`` or ``examples`` is not positive.
    """

    holds_trained: ClassVar[bool] = True

    def __init__(self, strength: float, examples: int = 200) -> None:
        strength = float(strength)  # YAML takes 1e3 for a string
        if strength <= 0 or not isinstance(examples, int) or examples < 1:
            raise ValueError(
                f"ewc needs a positive strength and at least 1 of examples, got {strength=} and {examples=}"
            )
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
        for name, parameter in parameters.items():
            self.held.merge(name, fisher[name], parameter.detach().float().clone())

    def state_dict(self) -> dict[str, Tensor]:
        return self.held.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.held.load_state_dict(state)
