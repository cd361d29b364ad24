"""Replay: train on a few examples of earlier tasks again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curlora.callbacks.replay import chosen
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.tasks import Row

__all__ = ["ReplayPlugin"]


class ReplayPlugin(Plugin):
    """Keeps some examples of each task and mixes them into the training of all later ones.

    This is experience replay with a fixed number of examples per task (Chaudhry et al. 2019,
    https://arxiv.org/abs/1902.10486). The heads of earlier tasks answer the replayed examples and stay frozen. Every
    label has the same weight, so an example with a long completion has more weight than one with a class.

    Args:
        examples: number of examples kept of each task, chosen at random with the run's seed; all if a task has fewer.

    Raises:
        ValueError: if ``examples`` is not positive.
    """

    def __init__(self, examples: int) -> None:
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"replay needs examples to be a whole number of 1 or more, got {examples!r}")
        self.examples = examples
        self.kept: list[Row] = []

    def describe(self) -> dict[str, Any]:
        return {"name": "replay", "examples": self.examples}

    def added_rows(self, task: int) -> int:
        return self.examples * task

    def training_rows(self, context: TaskContext) -> Sequence[Row]:
        return [*context.rows, *self.kept]

    def after_task(self, context: TaskContext) -> None:
        self.kept += [context.rows[i] for i in chosen(len(context.rows), self.examples, context.choice_seed)]

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for number, row in enumerate(self.kept):
            state[f"{number}.input_ids"] = torch.tensor(row["input_ids"])
            state[f"{number}.labels"] = torch.tensor(row["labels"])
            state[f"{number}.task"] = torch.tensor(row["task"])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        keys = ("input_ids", "labels", "task")
        count = len(state) // len(keys)
        self.kept = [{key: state[f"{number}.{key}"].tolist() for key in keys} for number in range(count)]
