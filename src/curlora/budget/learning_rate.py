"""The default learning rate of LoRA within a budget."""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["lora_learning_rate", "lora_learning_rate_of"]

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
    """
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
