"""Start a classification task with a head that is fitted to the model, not with a random one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from curlora.continual import probe
from curlora.continual.errors import RunError
from curlora.continual.plugins.base import Plugin, TaskContext

__all__ = ["ProbePlugin"]


class ProbePlugin(Plugin):
    """Fits a task's head to the model's hidden states before the task, see :mod:`curlora.continual.probe`.

    Model and head are then trained together. With a random head, the first steps would change the model in ways that
    have nothing to do with the task, and distort its features (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    Since the head is good from the start, a tenth of the usual ``head_learning_rate`` is enough. With the method
    ``frozen`` this gives the strongest heads-only baseline. Tasks without a head are not changed.

    Args:
        ridge: see :func:`curlora.continual.probe.fit`.
        batch_size: rows in a batch when hidden states are computed.
        again: whether the head is fitted again after the task, to the trained model. Other plug-ins change the model
            before that.

    Raises:
        ValueError: if ``ridge`` is not positive, ``batch_size`` is not a positive integer, or ``again`` is not a
            boolean.
    """

    for_heads: ClassVar[bool] = True

    def __init__(self, ridge: float = 0.1, batch_size: int = 32, again: bool = False) -> None:
        self.ridge, self.batch_size, self.again = float(ridge), batch_size, again
        if not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ValueError(f"probe needs a positive ridge, got {ridge}")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"probe needs a batch_size of 1 or more, got {batch_size!r}")
        if not isinstance(again, bool):
            raise ValueError(f"probe: again must be true or false, got {again!r}")

    def describe(self) -> dict[str, Any]:
        return {"name": "probe", "ridge": self.ridge, "batch_size": self.batch_size, "again": self.again}

    def before_task(self, context: TaskContext) -> None:
        self._fit(context)

    def after_task(self, context: TaskContext) -> None:
        if self.again:
            self._fit(context)

    def _fit(self, context: TaskContext) -> None:
        heads, key = context.model.heads, str(context.number)
        if key not in heads:
            return
        head = heads[key]
        assert isinstance(head, nn.Linear)
        rows = sorted(context.rows, key=lambda row: -len(row["input_ids"]))  # keeps padding low
        pieces = (rows[begin : begin + self.batch_size] for begin in range(0, len(rows), self.batch_size))
        try:
            states, labels = probe.states_and_labels(context.model, map(context.collate, pieces))
            probe.fit(head, states, labels, self.ridge)
        except ValueError as error:
            raise RunError(f"plug-in probe: {error}") from error
