"""The base class of penalties that are added to the loss of any Trainer."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curlora.guard.callback import act_first

__all__ = ["PenaltyCallback", "uses_deepspeed"]


class PenaltyCallback(TrainerCallback):
    """Adds the gradient of a penalty to the gradient of the loss, once for each optimizer step.

    The gradient is added before the first batch of a step. Gradient accumulation therefore adds it only once, and
    gradient clipping uses the sum of both. The logged loss does not include the penalty, which is logged under the name
    :attr:`logged_as`. In fp16 the penalty is scaled as the loss is. With several processes, all add the same gradient,
    so their mean is this gradient.

    Raises:
        ValueError: when training begins, if the model is sharded by FSDP or DeepSpeed, whose gradients are not those of
            whole parameters.
    """

    logged_as: ClassVar[str] = "penalty"

    def __init__(self) -> None:
        self.value: float | None = None
        """The penalty of the last step."""

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        """Return the penalty of a step as a scalar tensor; ``None`` for no penalty.

        Args:
            model: the trained model.
            step: the number of the step, from 0. A resumed training continues the numbers.
        """
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_whole(kwargs["model"], args)
        act_first(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        penalty = self.penalty(model, state.global_step)
        if penalty is None:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Not backward(): with several processes, DDP would take it for the end of a batch and reduce the gradients.
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # of fp16, in Accelerate's optimizer
        gradients = torch.autograd.grad(
            penalty if scaler is None else scaler.scale(penalty), trained, allow_unused=True
        )
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


def check_strength(strength: float) -> None:
    """Check the factor of a penalty.

    Raises:
        ValueError: if it is not a positive, finite number.
    """
    if not isinstance(strength, int | float) or not (strength > 0 and math.isfinite(strength)):
        raise ValueError(f"strength must be a positive number, got {strength!r}.")


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Return whether a Trainer trains under DeepSpeed, by its arguments or by Accelerate's configuration."""
    return bool(args.deepspeed) or args.deepspeed_plugin is not None


def _check_whole(model: nn.Module, args: TrainingArguments) -> None:
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    sharded |= any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if sharded or uses_deepspeed(args):
        raise ValueError(
            "A penalty needs whole parameters, and FSDP or DeepSpeed shards them. Train with DDP, or within a "
            "budget of a CURLoRA adapter, whose guard needs no penalty."
        )
