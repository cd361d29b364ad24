"""Columns and rows of a CURLoRA adapter by what its first task uses, in the place of the paper's draw."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curlora.continual import probe
from curlora.continual.errors import RunError
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.guard import GuardError, redraw

__all__ = ["Redraw"]


class Redraw(Plugin):
    """Before an adapter's first task, :func:`curlora.redraw` for it; the recipe's ``guard`` text is the general text.

    A classification task is seen through a head that is fitted to the states of the model as it is
    (:mod:`curlora.continual.probe`): through a fresh one gradients say nothing of the task. Training begins with a
    fresh one as ever. Later tasks are learned with the same columns and rows, unless each has an adapter of its own.

    Args:
        examples: of the task's training split that are looked at; all where it has fewer.
        batch_size: rows of the task, and of the text, that gradients are taken of together.

    Raises:
        ValueError: if one of them is not a whole number of 1 or more.
    """

    only_for: ClassVar[str | None] = "curlora"
    needs_guard_text: ClassVar[bool] = True
    changes_start: ClassVar[bool] = True

    def __init__(self, examples: int = 320, batch_size: int = 8) -> None:
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"redraw needs {name} of 1 or more, got {value!r}")
        self.examples, self.batch_size = examples, batch_size
        self.tasks_drawn = 0  # up to the last that an adapter was redrawn for

    def describe(self) -> dict[str, Any]:
        return {"name": "redraw", "examples": self.examples, "batch_size": self.batch_size}

    def before_task(self, context: TaskContext) -> None:
        if self.tasks_drawn > context.adapter_since:  # for a task before this one, or before the run was cut off
            return
        assert context.guard_text is not None  # the recipe sees to it
        model, text = context.model, context.guard_text
        generator = torch.Generator().manual_seed(context.seed)
        order = torch.randperm(len(context.rows), generator=generator)[: self.examples].tolist()
        # Little padding; the longest first, so that memory that is short is found out at once.
        order.sort(key=lambda i: -len(context.rows[i]["input_ids"]))
        device = next(model.parameters()).device
        batches = [
            {key: value.to(device) for key, value in context.collate([context.rows[i] for i in chosen]).items()}
            for chosen in (order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size))
        ]
        with self._fitted_head(context, batches):
            try:
                redraw(
                    model.language_model,
                    batches,
                    text.pieces(),
                    # Each row's sum over its labels, and so each label weighs the same, whatever batch it is in.
                    loss=lambda batch: model(**batch, num_items_in_batch=len(batch["task"]))["loss"],
                    batch_size=self.batch_size,
                    adapter=context.adapter,
                    seed=context.seed,
                    progress=False,
                )
            except GuardError as error:
                raise RunError(f"plug-in redraw: {error}") from error
        self.tasks_drawn = context.number + 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"tasks_drawn": torch.tensor(self.tasks_drawn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tasks_drawn = int(state["tasks_drawn"])

    @contextlib.contextmanager
    def _fitted_head(self, context: TaskContext, batches: list[dict[str, Tensor]]) -> Iterator[None]:
        """While it lasts the task's head is one that has been fitted."""
        heads, key = context.model.heads, str(context.number)
        if key not in heads:  # the language model answers itself
            yield
            return
        fresh = heads[key]
        assert isinstance(fresh, nn.Linear)
        head = copy.deepcopy(fresh).float()  # a new one would draw numbers
        try:
            probe.fit(head, *probe.states_and_labels(context.model, batches))
        except ValueError as error:
            raise RunError(f"plug-in redraw: {error}") from error
        heads[key] = head
        try:
            yield
        finally:
            heads[key] = fresh
