"""The outcome of a training under a budget."""

from __future__ import annotations

import dataclasses

from curlora.guard.ledger import TextOutcome

__all__ = ["Outcome"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a training under a budget.

    Args:
        predicted: the guard's prediction of the KL divergence from the base model on its text, in nats per token;
            ``None`` for an adapter without a guard.
        kept: the share of the training's change that remained after scaling back, 0 to 1.
        learning_rate: the adapter's learning rate; for a CURLoRA adapter in square roots of nats.
        texts: the measurements by the texts' names.
    """

    predicted: float | None
    kept: float
    learning_rate: float
    texts: dict[str, TextOutcome]
