"""Context managers that put a model into evaluation mode or disable its adapters, and restore it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["changes_the_base", "evaluating", "without_adapters"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and restore the mode of each module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def changes_the_base(initialization: Any) -> bool:
    """Return whether a LoRA adapter with this ``init_lora_weights`` changes the base model's weights when it is made.

    Disabling such an adapter does not give the base model.
    """
    changing = ("pissa", "olora", "corda", "loftq", "lora_ga")
    return isinstance(initialization, str) and initialization.lower().startswith(changing)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable all adapters; afterwards enable those that were active before, and restore ``requires_grad``.

    This also disables adapters that were added by transformers or by :func:`peft.inject_adapter_in_model`.
    """
    modules = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = [module for module in modules if not module.disable_adapters]
    # PEFT clears requires_grad of a disabled adapter and sets it for every active one, even where a user froze it.
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Prompt learning has no layers to disable.
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
