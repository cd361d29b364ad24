"""The methods a stream is run with: what is put on the base model, and how fast it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftConfig, get_peft_model
from torch import nn

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Args:
        name: short name; a folder of the run is called so.
        label: the name people read.
        adapter: makes the PEFT configuration of the adapter; ``None`` trains the heads alone.
        learning_rate: of the adapter's parameters.
    """

    name: str
    label: str
    adapter: Callable[[], PeftConfig] | None = None
    learning_rate: float = 0.0

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the adapter on ``model``, or freeze it where there is none."""
        if self.adapter is None:
            return model.requires_grad_(False)
        return get_peft_model(model, self.adapter())
