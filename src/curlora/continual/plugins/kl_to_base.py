"""A penalty on the KL divergence from the base model on a general text, computed at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from curlora.callbacks.kl_to_base import kl_to_base, pieces_of
from curlora.callbacks.strength import Strength
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.task_model import TaskModel

__all__ = ["KLToBase"]


class KLToBase(Plugin):
    """Adds ``strength * KL(base || model)`` on a piece of the recipe's ``guard`` text to the loss of every step.

    This is learning without forgetting (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282), with a general text in
    place of the new task's data. It costs two more forward passes and one backward pass per step. The pieces of the
    text are used in turn. Full fine-tuning, and adapters that change the base model's weights, need a second copy of
    the base model for it.

    Args:
        strength: factor of the penalty, which is in nats per token, relative to the mean loss of a batch.
        tokens: the most tokens of the piece that is used at a step.
        max_kl: the largest divergence, in nats per token: the strength rises as far as it takes, see
            :class:`curlora.callbacks.Strength`. ``None`` for a constant strength.

    Raises:
        ValueError: if ``strength`` or ``max_kl`` is not positive, or ``tokens`` less than 2.
    """

    needs_guard_text: ClassVar[bool] = True

    def __init__(self, strength: float, tokens: int = 128, max_kl: float | None = None) -> None:
        self.strength = Strength(float(strength), None if max_kl is None else float(max_kl))
        if not isinstance(tokens, int) or tokens < 2:
            raise ValueError(f"kl_to_base needs 2 tokens or more, got {tokens!r}")
        self.tokens = tokens
        self.pieces: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.base_logits: Callable[[Tensor, int], Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        limit = {} if self.strength.limit is None else {"max_kl": self.strength.limit}
        return {"name": "kl_to_base", "strength": self.strength.start, "tokens": self.tokens, **limit}

    def before_task(self, context: TaskContext) -> None:
        assert context.guard_text is not None  # checked by the recipe
        self.base_logits = context.base_logits
        self.pieces = pieces_of(context.guard_text.pieces(self.tokens))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.strength.begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step  # a resumed run uses the same piece

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.strength.step(state)

    def penalty(self, model: TaskModel) -> Tensor | None:
        if self.base_logits is None:  # only heads are trained, so the model cannot drift
            return None
        piece = self.pieces[self.step % len(self.pieces)]
        return self.strength.of(kl_to_base(model.language_model, *piece, self.base_logits))
