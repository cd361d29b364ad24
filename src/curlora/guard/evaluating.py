"""A model for a while as it is not in training: in evaluation mode, or without its adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["evaluating", "without_adapters"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode while it lasts; afterwards each of the model's modules is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model while it lasts; afterwards the same parameters are trained as before.

    Also without adapters that transformers has put into a model, or :func:`peft.inject_adapter_in_model`.
    """
    modules = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = [module for module in modules if not module.disable_adapters]
    # PEFT takes it from what is disabled, and gives it to all that is active, to what a user froze as well.
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Learned prompts are in no layer.
    prompts = model.disable_adapter() if isinstance(model, PeftModel) and not modules else contextlib.nullcontext()
    try:
        for module in active:
            module.enable_adapters(False)
        with prompts:
            yield
    finally:
        for module in active:
            module.enable_adapters(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
