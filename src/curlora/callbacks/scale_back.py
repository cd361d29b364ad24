"""After a training what it changed is scaled back until a measure has risen no more than is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora.guard.callback import Kept
from curlora.guard.scale_back import scale_to_limit

__all__ = ["ScaleBackCallback"]


class ScaleBackCallback(TrainerCallback):
    """Moves what a training changed back along the straight line to where it began, until a limit is kept.

    For any model and any way of training it: the simplest way to keep to a budget, by measuring at the end. After the
    last step, before the last evaluation and checkpoint; and again where the best checkpoint was loaded since.
    :attr:`kept` says how much of the change was kept, and the rise that was measured. It holds a copy of the
    parameters.

    Make it before training begins, also where a checkpoint is gone on from: the change is counted from there, and of a
    further training from where the last one ended. The measure counts from there for good.

    Args:
        model: that is trained.
        measure: of the model as it is at that moment, positive and the lower the better, such as
            ``lambda: curlora.guard.perplexity(model, texts, tokenizer)``.
        max_rise: the most that it may rise by, relatively: 0.01 for 1 %.
        parameters: that are moved back; all that the model trains if ``None``. Leave out a new head: scaled back it
            would answer nothing.

    Raises:
        ValueError: if ``max_rise`` or the measure is not positive, or nothing is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        measure: Callable[[], float],
        max_rise: float,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        if not (max_rise > 0 and math.isfinite(max_rise)):
            raise ValueError(f"max_rise must be a positive number, 0.01 for 1 %, got {max_rise}")
        trained = parameters if parameters is not None else (p for p in model.parameters() if p.requires_grad)
        self.measure, self.max_rise, self.parameters = measure, max_rise, list(trained)
        if not self.parameters:
            raise ValueError("The model trains nothing: make this callback when its adapter is on it")
        self.at_start = measure()
        if not (self.at_start > 0 and math.isfinite(self.at_start)):
            raise ValueError(f"The measure must be a positive number, and is {self.at_start} before training")
        self.kept: Kept | None = None
        self._before = self._now()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.kept = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # before the last evaluation and checkpoint
            self._hold()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hold()  # stopped early, or the best checkpoint was loaded; else nothing is left to do
        assert self.kept is not None
        state.log_history.append({"kept": self.kept.scale, "rise": self.kept.rise, "step": state.global_step})
        self._before = self._now()

    def _hold(self) -> None:
        scale, rise = scale_to_limit(
            self.max_rise, lambda: self.measure() / self.at_start - 1, self.parameters, self._before
        )
        if self.kept is None or scale < 1:
            self.kept = Kept(scale if self.kept is None else scale * self.kept.scale, rise)

    def _now(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]
