"""A penalty on moving away from the base model on a general text, taken afresh at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.kl_to_base import kl_to_base, pieces_of
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.task_model import TaskModel

__all__ = ["KLToBase"]


class KLToBase(Plugin):
    """Adds ``strength * KL(base || model)`` on a piece of the recipe's ``guard`` text to the loss of every step.

    As in learning without forgetting (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282), with the general text in
    the place of the new task's. It costs two more forward passes and a backward at every step. The pieces are those
    that a guard is calibrated on, taken in turn. Full fine-tuning, and adapters that change the base model's weights,
    hold a second copy of it for this.

    Args:
        strength: of the penalty, nats per token, beside the mean loss of a batch.
        tokens: of the piece at each step, at most.

    Raises:
        ValueError: if ``strength`` is not positive or ``tokens`` less than 2.
    """

    needs_guard_text: ClassVar[bool] = True

    def __init__(self, strength: float, tokens: int = 128) -> None:
        self.strength = float(strength)
        if not (self.strength > 0 and math.isfinite(self.strength)) or not isinstance(tokens, int) or tokens < 2:
            raise ValueError(f"kl_to_base needs a positive strength and 2 tokens or more, got {strength=} {tokens=}")
        self.tokens = tokens
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.base_logits: Callable[[Tensor, int], Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        return {"name": "kl_to_base", "strength": self.strength, "tokens": self.tokens}

    def before_task(self, context: TaskContext) -> None:
        assert context.guard_text is not None  # the recipe sees to it
        self.base_logits = context.base_logits
        self.pieces = pieces_of(context.guard_text.pieces(self.tokens))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step  # and so the same piece where a run that was cut off goes on

    def penalty(self, model: TaskModel) -> Tensor | None:
        if self.base_logits is None:  # nothing of the model moves
            return None
        piece = self.pieces[self.step % len(self.pieces)]
        return self.strength * kl_to_base(model.language_model, *piece, self.base_logits)
