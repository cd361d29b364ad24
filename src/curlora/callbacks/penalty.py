"""A penalty on a model's parameters, beside the loss of any Trainer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora.guard.callback import act_first

__all__ = ["PenaltyCallback"]


class PenaltyCallback(TrainerCallback):
    """Adds the gradient of a penalty to that of the loss, once for each optimizer step.

    It is there before the first batch of a step is run, so gradient accumulation does not count it more than once, and
    clipping goes by the sum of both. The loss that is logged stays the Trainer's own; the penalty stands beside it, by
    the name of :attr:`logged_as`. With several processes each adds the same, and their mean is that. Not for models
    in pieces (FSDP, DeepSpeed).
    """

    logged_as: ClassVar[str] = "penalty"

    def __init__(self) -> None:
        self.value: float | None = None
        """The penalty of the last step."""

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        """What is added to the loss of a step; ``None`` if nothing.

        Args:
            model: as it is trained.
            step: its number, from 0; the same where a training goes on from a checkpoint.
        """
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:
            raise ValueError(
                f"{type(self).__name__} adds to gradients, which fp16 training scales by a factor that it does not "
                "know. Train with bf16=True, or in float32."
            )
        act_first(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        penalty = self.penalty(model, state.global_step)
        if penalty is None:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Not backward(): of several processes' gradients DDP would take this for the end of a batch.
        gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.value = float(penalty.detach())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and self.value is not None:
            logs[self.logged_as] = state.log_history[-1][self.logged_as] = self.value
