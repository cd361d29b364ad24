"""The interface of a restraint: what keeps a model near its base while it trains under a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from transformers import TrainerCallback

from curlora.budget.outcome import Outcome
from curlora.guard.ledger import TextOutcome
from curlora.guard.measured_limit import Kept
from curlora.text.rows import Rows

__all__ = ["Restraint"]


class Restraint(TrainerCallback, ABC):
    """Keeps a model near its base while one adapter trains.

    :class:`curlora.ForgettingBudget` measures the texts before and after training, and scales the change back at the
    end. A restraint acts during training, so that little has to be scaled back. The budget calls, in this order,
    :meth:`prepare` or, if the training resumes, :meth:`load_state_dict`; :meth:`set_limits`; the events of a
    :class:`transformers.TrainerCallback` from ``on_train_begin`` to ``on_train_end``. It calls :meth:`record` after the
    last step, and again at the end if the parameters have changed since.

    Args:
        model: the model with its adapter.
        adapter: the adapter's name.
        rows: the texts that the budget limits, by name.
    """

    moved: ClassVar[str]
    """What is scaled back, for messages."""

    def __init__(self, model: nn.Module, adapter: str, rows: Mapping[str, Rows]) -> None:
        self.model, self.adapter, self.rows = model, adapter, rows

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """The trained parameters that are scaled back, always in the same order."""

    @property
    def rated(self) -> Sequence[Tensor]:
        """The parameters that the rate of :meth:`learning_rate` is for."""
        return self.parameters

    @property
    def trained_before(self) -> bool:
        """Whether the adapter may differ from the base model already."""
        return True

    @property
    def last_measured(self) -> Mapping[str, TextOutcome]:
        """The last outcome of each text that an earlier training has measured, by name, as far as it is known."""
        return {}

    @property
    def newest_measured(self) -> Collection[str]:
        """The names of the texts that the adapter's last training has measured, as far as they are known."""
        return ()

    @abstractmethod
    def prepare(self, lifetime: float | None) -> float | None:
        """Prepare a training that begins. Called before anything is measured.

        Args:
            lifetime: the limit over all trainings, as a relative rise of perplexity, if this training gives one.

        Returns:
            The limit over all trainings: this one, or one that an earlier training has given.
        """

    @abstractmethod
    def as_base(self) -> AbstractContextManager[None]:
        """Make the model the one that forgetting is counted from, for the duration of a ``with`` statement."""

    def set_limits(self, limits: Mapping[str, float], otherwise: float) -> None:
        """Take in the limits of the training.

        Args:
            limits: the texts' limits by name: relative rises of perplexity since before the first training.
            otherwise: the limit of a text that has none.
        """
        return

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed training needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of a training that is resumed."""
        assert not state

    @abstractmethod
    def learning_rate(self, steps: int) -> float | None:
        """Return the learning rate that suits a training of so many steps; ``None`` if no rule is known."""

    def problem_of(self, rate: float, steps: int) -> str | None:
        """Return a warning about a learning rate that the user has set, or ``None``."""
        return None

    def logs(self) -> dict[str, float]:
        """Return values that are logged beside the loss."""
        return {}

    def predicted(self) -> float | None:
        """Return the predicted KL divergence from the base model, in nats per token; ``None`` without a prediction."""
        return None

    def record(self, steps: int, outcome: Outcome) -> None:
        """Enter a finished training in the adapter's history, if it has one."""
        return

    def save_record(self, folder: Path) -> None:
        """Save the history in a folder where the adapter was saved without it."""
        return

    def why_nothing(self, kept: Kept) -> str:
        """Return a message that explains why nothing of the training was kept, although its parameters are finite."""
        if not math.isfinite(kept.rise):
            return (
                "The measure of a text is not a number after training, nor when the whole change is taken back. Check "
                "the measurement."
            )
        if kept.rise > 1:
            return (
                f"The measure of a text has risen by {kept.rise:.3g} times its limit, although the whole change of "
                f"{self.moved} in this training was taken back. Were other parameters trained as well?"
            )
        return (
            f"No part of the change of {self.moved} keeps every text within its limit, so the whole change was taken "
            "back. Give a larger limit, or a lower learning rate."
        )
