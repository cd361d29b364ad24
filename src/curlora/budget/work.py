"""The work of a budget before and after training, for progress bars."""

from __future__ import annotations

__all__ = ["WITH_BACKWARD", "WRITTEN", "work_of"]

# The work for a token, in forward passes over one token.
WITH_BACKWARD = 3
WRITTEN = 4  # generated token by token, many rows at once


def work_of(tokens: int, examples: int, *, written: bool, guarded: bool, trained_before: bool) -> tuple[float, float]:
    """Return the work of a budget before training and after it, in tokens of a forward pass, as ``progress`` counts it.

    Args:
        tokens: the number of tokens of the guard's texts.
        examples: the number of tokens of the training examples that are used, at most
            :data:`curlora.budget.examples.COUNT` examples.
        written: whether the model has to write the text.
        guarded: whether the adapter is a CURLoRA adapter, which gets a guard.
        trained_before: whether the adapter has been trained within a budget before.
    """
    before = WRITTEN * tokens * written + tokens * (1 + trained_before)
    if guarded and not trained_before:  # columns and rows, and the calibration
        before += WITH_BACKWARD * (2 * tokens + examples)
    return float(before), float(tokens + WITH_BACKWARD * examples * guarded)
