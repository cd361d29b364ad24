"""Elastic weight consolidation: what mattered to earlier tasks is held where it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.plugins.drawn import diverged, drawn_gradients, examples_of, trained
from curlora.continual.task_model import TaskModel

__all__ = ["EWC", "fisher_diagonal"]


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
        self.curvature: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def describe(self) -> dict[str, Any]:
        return {"name": "ewc", "strength": self.strength, "examples": self.examples}

    def penalty(self, model: TaskModel) -> Tensor | None:
        if not self.curvature:
            return None
        for held in (self.curvature, self.centre):  # once, after they were read from a file
            held.update({name: held[name].to(p.device) for name, p in trained(model)})
        terms = [(self.curvature[name] * (p - self.centre[name]) ** 2).sum() for name, p in trained(model)]
        return 0.5 * self.strength * torch.stack(terms).sum()

    def after_task(self, context: TaskContext) -> None:
        if diverged(context.model):
            return
        batches, generator = examples_of(context, self.examples)
        fisher = fisher_diagonal(context.model, batches, generator)
        for name, parameter in trained(context.model):
            self.merge(name, fisher[name], parameter.detach().float().clone())

    def merge(self, name: str, fisher: Tensor, value: Tensor) -> None:
        """Add ``fisher * (theta - value)**2`` to what is held, up to a constant."""
        # What was read from a file may still be elsewhere: a run that is gone on with may begin here.
        old = self.curvature.get(name, torch.zeros_like(fisher)).to(fisher.device)
        centre = self.centre.get(name, value).to(fisher.device)
        total = old + fisher
        # Where nothing has mattered yet, the centre is of no account.
        self.centre[name] = torch.where(total > 0, (old * centre + fisher * value) / total.clamp(min=1e-38), value)
        self.curvature[name] = total

    def state_dict(self) -> dict[str, Tensor]:
        return {
            **{f"curvature.{name}": value for name, value in self.curvature.items()},
            **{f"centre.{name}": value for name, value in self.centre.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for part, held in (("curvature.", self.curvature), ("centre.", self.centre)):
            held.clear()
            held.update({key.removeprefix(part): value for key, value in state.items() if key.startswith(part)})


def fisher_diagonal(
    model: TaskModel, batches: Iterator[dict[str, Tensor]], generator: torch.Generator
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of what is trained, heads excepted: ``E[(d log p(y) / d theta)**2]``.

    Args:
        model: the model; its gradients are left alone.
        batches: one example each.
        generator: of the answers, see :func:`curlora.continual.plugins.drawn.drawn_gradients`.

    Returns:
        By name of parameter, in its shape.
    """
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trained(model)}
    count = 0
    for gradients in drawn_gradients(model, batches, generator):
        for name, gradient in gradients.items():
            total[name] += gradient.float() ** 2
        count += 1
    return {name: value / count for name, value in total.items()}
