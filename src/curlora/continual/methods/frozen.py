"""Heads only: the baseline that leaves the base model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from curlora.continual.heldout import HeldOut
from curlora.continual.methods.base import Method

__all__ = ["Frozen"]


@dataclass(frozen=True)
class Frozen(Method):
    """Trains only the heads. A task without a head is answered by the base model and trains nothing."""

    trains_backbone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.options or self.learning_rate or not all(make().for_heads for make in self.plugins):
            raise ValueError(
                "frozen trains only the heads: leave out options, learning_rate, and all plugins except probe"
            )

    @property
    def kind(self) -> str:
        return "frozen"

    def apply(self, model: nn.Module, seed: int, text: HeldOut | None = None) -> nn.Module:
        return model.requires_grad_(False)

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        return lambda ids, kept: model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

    def save(self, model: nn.Module, directory: Path) -> int:
        return 0
