"""A penalty on the KL divergence from the base model on a general text, computed at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.kl_to_base import kl_to_base, pieces_at, pieces_of
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.task_model import TaskModel

__all__ = ["KLToBasePlugin"]


class KLToBasePlugin(Plugin):
    """Adds ``strength * KL(base || model)`` on pieces of the recipe's ``guard`` text to the loss of every step.

    This is learning without forgetting (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282), with a general text in
    place of the new task's data. It costs two more forward passes and one backward pass per step. The pieces of the
    text are used in turn, in a random order. Full fine-tuning, and adapters that change the base model's weights, need
    a second copy of the base model for it.

    Args:
        strength: factor of the penalty, which is in nats per token, relative to the mean loss of a batch.
        tokens: the most tokens of a piece.
        rows_per_step: the number of pieces in a step.

    Raises:
        ValueError: if ``strength`` or ``rows_per_step`` is not positive, or ``tokens`` less than 2.
    """

    needs_guard_text: ClassVar[bool] = True

    def __init__(self, strength: float, tokens: int = 128, rows_per_step: int = 1) -> None:
        self.strength = float(strength)
        if not (self.strength > 0 and math.isfinite(self.strength)) or not isinstance(tokens, int) or tokens < 2:
            raise ValueError(f"kl_to_base needs a positive strength and 2 tokens or more, got {strength=} {tokens=}")
        if not isinstance(rows_per_step, int) or rows_per_step < 1:
            raise ValueError(f"kl_to_base needs 1 row per step or more, got {rows_per_step=}")
        self.tokens, self.rows_per_step = tokens, rows_per_step
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.base_logits: Callable[[Tensor, int], Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": "kl_to_base",
            "strength": self.strength,
            "tokens": self.tokens,
            "rows_per_step": self.rows_per_step,
        }

    def before_task(self, context: TaskContext) -> None:
        assert context.guard_text is not None  # checked by the recipe
        self.base_logits = context.base_logits
        self.pieces = pieces_of(context.guard_text.pieces(self.tokens))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step  # a resumed run uses the same piece

    def penalty(self, model: TaskModel) -> Tensor | None:
        if self.base_logits is None:  # only heads are trained, so the model cannot drift
            return None
        ids, counted = pieces_at(self.pieces, self.step, self.rows_per_step)
        logits = self.base_logits
        return self.strength * kl_to_base(model.language_model, ids, counted, lambda ids: logits(ids, ids.shape[1]))
