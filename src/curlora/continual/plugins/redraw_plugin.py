"""Choose a CURLoRA adapter's columns and rows by the gradients of its first task, instead of the paper's draw."""

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

__all__ = ["RedrawPlugin"]


class RedrawPlugin(Plugin):
    """Calls :func:`curlora.redraw` before an adapter's first task, with the recipe's ``guard`` text as general text.

    For a classification task, gradients are computed through a head that is fitted to the model's hidden states
    (:mod:`curlora.continual.probe`): gradients through an untrained head say nothing about the task. Training still
    starts with an untrained head. Later tasks use the same columns and rows, unless each task has its own adapter.

    Args:
        examples: number of training examples that are used; all if the task has fewer.
        batch_size: rows of the task, and of the text, in a batch.

    Raises:
        ValueError: if an argument is not a positive integer.
    """

    only_for: ClassVar[str | None] = "curlora"
    needs_guard_text: ClassVar[bool] = True
    changes_start: ClassVar[bool] = True

    def __init__(self, examples: int = 320, batch_size: int = 8) -> None:
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"redraw needs {name} of 1 or more, got {value!r}")
        self.examples, self.batch_size = examples, batch_size
        self.tasks_drawn = 0  # 1 + number of the last task for which an adapter was redrawn

    def describe(self) -> dict[str, Any]:
        return {"name": "redraw", "examples": self.examples, "batch_size": self.batch_size}

    def before_task(self, context: TaskContext) -> None:
        if self.tasks_drawn > context.adapter_since:  # redrawn for an earlier task, or before the run was interrupted
            return
        assert context.guard_text is not None  # checked by the recipe
        model, text = context.model, context.guard_text
        generator = torch.Generator().manual_seed(context.seed)
        order = torch.randperm(len(context.rows), generator=generator)[: self.examples].tolist()
        # Sorting keeps padding low. With the longest rows first, a lack of memory shows at once.
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
                    # The sum over a row's labels: each label has the same weight, whichever batch it is in.
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
        """Replace the task's head by a fitted one within the context."""
        heads, key = context.model.heads, str(context.number)
        if key not in heads:  # the language model itself answers
            yield
            return
        fresh = heads[key]
        assert isinstance(fresh, nn.Linear)
        head = copy.deepcopy(fresh).float()  # a new head would use the random number generator
        try:
            probe.fit(head, *probe.states_and_labels(context.model, batches))
        except ValueError as error:
            raise RunError(f"plug-in redraw: {error}") from error
        heads[key] = head
        try:
            yield
        finally:
            heads[key] = fresh
