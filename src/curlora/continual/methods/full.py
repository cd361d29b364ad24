"""Full fine-tuning of every parameter of the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curlora.continual.heldout import HeldOut
from curlora.continual.methods.base import Method

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Method):
    """Trains every parameter. Drift is measured against a second copy of the base model, held in memory."""

    def __post_init__(self) -> None:
        if self.options:
            raise ValueError(f"options: full has no options: leave out {next(iter(self.options))!r}")

    @property
    def kind(self) -> str:
        return "full"

    def apply(self, model: nn.Module, seed: int, text: HeldOut | None = None) -> nn.Module:
        return model.requires_grad_(True)

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        base: Any = load_model().eval().requires_grad_(False).to(next(model.parameters()).device)
        return lambda ids, kept: base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

    def save(self, model: nn.Module, directory: Path) -> int:
        folder = directory / "model"
        language_model: Any = model
        language_model.save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
