"""Replay of general text: train on pieces of the recipe's ``guard`` text beside every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from curlora.callbacks.kl_to_base import pieces_of
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.tasks import Row
from curlora.text.rows import IGNORED

__all__ = ["ReplayTextPlugin"]

# No task has this number, so no head reads the rows: they are learned as text.
_NO_TASK = -1


class ReplayTextPlugin(Plugin):
    """Mixes pieces of the recipe's ``guard`` text into the examples of every task, and trains on them as text.

    This is the common way to keep general abilities while training on new data. With a text that the base model wrote
    itself, it is a distillation by samples. Every label has the same weight, so a piece has more weight than a class.

    Args:
        pieces: the number of pieces that are added to each task, chosen at random with the run's seed; all if the text
            has fewer.
        tokens: the most tokens of a piece.

    Raises:
        ValueError: if ``pieces`` is not positive, or ``tokens`` less than 2.
    """

    needs_guard_text: ClassVar[bool] = True

    def __init__(self, pieces: int, tokens: int = 128) -> None:
        if not isinstance(pieces, int) or pieces < 1:
            raise ValueError(f"replay_text needs pieces to be a whole number of 1 or more, got {pieces!r}")
        if not isinstance(tokens, int) or tokens < 2:
            raise ValueError(f"replay_text needs tokens to be a whole number of 2 or more, got {tokens!r}")
        self.pieces, self.tokens = pieces, tokens

    def describe(self) -> dict[str, Any]:
        return {"name": "replay_text", "pieces": self.pieces, "tokens": self.tokens}

    def added_rows(self, task: int) -> int:
        return self.pieces

    def training_rows(self, context: TaskContext) -> Sequence[Row]:
        if context.guard_text is None:  # a plan, before the base model has written the text: whole pieces
            pieces = [(torch.zeros(self.tokens, dtype=torch.long), torch.ones(self.tokens, dtype=torch.bool))]
            pieces *= self.pieces
        else:
            pieces = pieces_of(context.guard_text.pieces(self.tokens), context.choice_seed)[: self.pieces]
        return [*context.rows, *(_row(*piece) for piece in pieces)]


def _row(ids: Tensor, counted: Tensor) -> Row:
    """Return a row in which every token that counts is predicted from those before it."""
    labels = ids.masked_fill(~counted, IGNORED)
    return {"input_ids": ids[:-1].tolist(), "labels": labels[1:].tolist(), "task": _NO_TASK}
