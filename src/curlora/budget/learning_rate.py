"""The learning rate of a training within a budget: the one that was chosen, or that of a rule."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainingArguments

from curlora._compat import scale_base_rate
from curlora.budget.restraint import Restraint
from curlora.errors import GuardError

__all__ = ["lora_learning_rate", "lora_learning_rate_of", "set_rate"]

_RATE, _WIDTH, _POWER, _ALPHA = 5e-4, 2000, 0.78, 32


def lora_learning_rate(hidden_size: int, alpha: float) -> float:
    """Return a learning rate for Adam and similar optimizers on LoRA.

    The rule is ``5e-4 * (2000 / hidden_size) ** 0.78 * 32 / alpha``. For ``alpha = 32`` it was fitted to the best rates
    of 14 models by Schulman et al., LoRA Without Regret (2025, https://thinkingmachines.ai/blog/lora/); the power is
    that of the Llama models. The best rate does not depend on the rank. Adam's first steps change a layer's output in
    proportion to ``alpha`` times the rate, so the rule keeps this product.

    Args:
        hidden_size: the width of the model.
        alpha: ``lora_alpha``; with another scaling than ``lora_alpha / r``, the scaling times ``r``.

    Raises:
        GuardError: if an argument is not positive.
    """
    if not (hidden_size > 0 and alpha > 0):
        raise GuardError(f"hidden_size and alpha must be positive, got {hidden_size} and {alpha:g}.")
    return _RATE * (_WIDTH / hidden_size) ** _POWER * _ALPHA / alpha


def lora_learning_rate_of(model: nn.Module, adapter: str) -> float | None:
    """Return :func:`lora_learning_rate` for an adapter of a model; ``None`` if the adapter is not LoRA.

    AdaLoRA, which scales by ``lora_alpha`` alone and trains singular values, is not LoRA here.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer) and adapter in module.scaling
    ]
    config: Any = getattr(model, "config", None)
    width = getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", None)
    if not layers or width is None:
        return None
    return lora_learning_rate(width, max(layer.scaling[adapter] * layer.r[adapter] for layer in layers))


def set_rate(
    restraint: Restraint, stated: float | None, args: TrainingArguments, steps: int, optimizer: Any, scheduler: Any,
    last: float,
) -> float:  # fmt: skip
    """Set the adapter's learning rate when a training begins.

    Args:
        restraint: the adapter's restraint, which has a rule for the rate or none.
        stated: the rate that the user gave to the budget, if any.
        args: the training arguments. A rate in them that is not their default was chosen by the user.
        steps: the number of steps of the training.
        optimizer, scheduler: the Trainer's.
        last: the rate that the last training of the same Trainer had; its optimizer still has it.

    Returns:
        The rate.

    Raises:
        GuardError: if the optimizer does not train the adapter, or trains other parameters in the same group.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimizer
    given = _rates_of(restraint, optimizer)
    default = next(field.default for field in dataclasses.fields(type(args)) if field.name == "learning_rate")
    # The user has chosen the rate in the arguments, or made an optimizer.
    chosen = args.learning_rate != default or any(rate not in (args.learning_rate, last) for rate in given)
    present = max(given, default=args.learning_rate)
    rate = stated or (None if chosen else restraint.learning_rate(steps))
    on_purpose = stated or (present if chosen else None)
    if on_purpose and (problem := restraint.problem_of(on_purpose, steps)) is not None:
        warnings.warn(problem, stacklevel=3)
    if rate is None:
        return present
    rated = {id(parameter) for parameter in (restraint.parameters if stated else restraint.rated)}
    for number, group in enumerate(optimizer.param_groups):
        mine = [id(parameter) in rated for parameter in group["params"]]
        if any(mine) and not all(mine):
            raise GuardError(
                f"{mine.count(False)} parameters other than {restraint.moved} are in the same optimizer group, and the "
                f"budget's learning rate, {rate:.2g}, does not suit them. Leave modules_to_save and trained biases "
                "out, or set learning_rate in the training arguments."
            )
        if any(mine):
            scale_base_rate(optimizer, scheduler, number, rate)
    return rate


def _rates_of(restraint: Restraint, optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the base rates of the groups with trained parameters.

    Raises:
        GuardError: if the optimizer lacks one of them.
    """
    trained = {id(parameter) for parameter in restraint.parameters}
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := len(trained - known):
        raise GuardError(
            f"The optimizer does not train {missing} of the {len(trained)} trained parameters of {restraint.moved}. "
            "Create it from this model's parameters, or let the trainer create it."
        )
    return [
        group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        if any(id(parameter) in trained for parameter in group["params"])
    ]
