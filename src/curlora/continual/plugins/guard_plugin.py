"""The guard over a stream: calibrated before an adapter's first task, and within its limit after every task."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from curlora.continual.errors import RunError
from curlora.continual.plugins.base import TaskContext
from curlora.continual.plugins.scale_back_plugin import ScaleBackPlugin, text_of
from curlora.continual.results import Guarded
from curlora.guard import Calibration, Guard, GuardCallback, GuardError, calibrate

__all__ = ["GuardPlugin"]


class GuardPlugin(ScaleBackPlugin):
    """Trains a CURLoRA adapter with :class:`curlora.GuardCallback`, on the recipe's ``guard`` text.

    The model is calibrated before an adapter's first task, which is usually the first of the stream. During training
    the predicted drift stays within the guard's budget. After each task the forgetting on the text is measured
    relative to the base model, and the task's change is scaled back until the limit is met, as in
    :class:`ScaleBackPlugin`.

    Args:
        max_perplexity_increase: the largest rise of the guard text's perplexity over the whole stream, relative to the
            base model: 0.01 for 1 %.
        max_kl: the alternative limit: the largest ``KL(base || model)`` on the text, in nats per token.
        spread: whether the limit grows in equal steps from task to task. If false, the first task may use all of it.
            Later tasks can then learn only by undoing earlier ones, or, with an adapter per task, only with what
            earlier tasks have left of the limit.
        slack: factor from the allowed rise, in nats, to the guard's budget during training. The measurement at the end
            decides: the text's perplexity may rise by less than the drift that the guard predicts. More slack lets
            training use more of that difference.
        damping: see :class:`curlora.Guard`.
        batch_size: rows of the text in a batch of the calibration; use 1 for a model that mixes the rows of a batch,
            such as a mixture of experts.

    Raises:
        ValueError: unless exactly one limit is given, or if an option is not positive.
    """

    only_for: ClassVar[str | None] = "curlora"

    def __init__(
        self,
        max_perplexity_increase: float | str | None = None,
        max_kl: float | None = None,
        spread: bool = True,
        slack: float = 1.0,
        damping: float = 0.1,
        batch_size: int = 8,
    ) -> None:
        super().__init__(max_perplexity_increase, max_kl, spread)
        self.slack, self.damping = float(slack), float(damping)
        for name, value in (("slack", self.slack), ("damping", self.damping)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"guard needs a positive {name}, got {value}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"guard needs a batch_size of 1 or more, got {batch_size!r}")
        self.batch_size = batch_size
        self.calibration: Calibration | None = None
        self.calibrated_at = 0  # number of the task before which the calibration ran
        self.drift_before = 0.0  # predicted drift of the adapters that are frozen now
        self.learned = 0.0  # predicted drift of all adapters after the last task
        self.guard: Guard | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": "guard",
            **self.limits(),
            "slack": self.slack,
            "damping": self.damping,
            "batch_size": self.batch_size,
        }

    def before_task(self, context: TaskContext) -> None:
        text, limit = text_of(context), self.measured(context)
        try:
            if self.calibration is None or self.calibrated_at < context.adapter_since:
                self.calibration = calibrate(
                    context.model.language_model,
                    text.pieces(),
                    batch_size=self.batch_size,
                    adapter=context.adapter,
                    seed=context.seed,
                    progress=False,
                )
                self.calibrated_at, self.drift_before = context.number, self.learned
            self.guard = Guard(
                context.model.language_model,
                self.calibration,
                budget=self.slack * self.nats(context, since=context.adapter_since),
                damping=self.damping,
                adapter=context.adapter,
            )
            self.held = GuardCallback(self.guard, **limit)
        except GuardError as error:
            raise RunError(f"plug-in guard: {error}") from error

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.held is not None
        self.held.on_train_begin(args, state, control, **kwargs)

    def drift(self) -> float | None:
        return None if self.guard is None else self.drift_before + self.guard.drift()

    def after_task(self, context: TaskContext) -> Guarded | None:
        assert self.guard is not None
        kept = super().after_task(context)
        self.learned = self.drift_before + self.guard.drift()
        return None if kept is None else kept.model_copy(update={"predicted": self.learned})

    def state_dict(self) -> dict[str, Tensor]:
        if self.calibration is None:
            return {}
        numbers = torch.tensor((self.calibrated_at, self.drift_before, self.learned), dtype=torch.float64)
        calibration = {f"calibration.{name}": value for name, value in self.calibration.state_dict().items()}
        return {"numbers": numbers, **super().state_dict(), **calibration}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        prefix = "calibration."
        calibration = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.calibration = Calibration.from_state_dict(calibration)
        super().load_state_dict(state)
        calibrated_at, self.drift_before, self.learned = state["numbers"].tolist()
        self.calibrated_at = int(calibrated_at)
