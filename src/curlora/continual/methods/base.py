"""What a method is to a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from curlora.continual.heldout import HeldOut
from curlora.continual.plugins import Plugin

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: what is put on the base model and what of it is trained.

    Args:
        name: short name; a folder of the run is called so.
        label: the name people read.
        learning_rate: of everything that is trained but the heads.
        options: of the method; each kind says which it has.
        plugins: make what is combined with the method, anew for every seed.
        training: settings that are different for this method.
        grid: where it is one of a recipe's grid, what it has there.

    Raises:
        ValueError: if an option is unknown or not allowed.
    """

    trains_backbone: ClassVar[bool] = True

    name: str
    label: str
    learning_rate: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    plugins: Sequence[Callable[[], Plugin]] = ()
    training: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What a recipe calls it."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Its options, for the report."""
        return self.options

    @property
    def needs_guard_text(self) -> bool:
        """Whether :meth:`apply` looks at a general text."""
        return False

    def apply(self, model: nn.Module, seed: int, text: HeldOut | None = None) -> nn.Module:
        """Prepare a fresh base model for training.

        Args:
            model: a causal language model; it is changed.
            seed: of the run.
            text: the recipe's ``guard`` text, where it has one.

        Returns:
            What is trained.
        """
        raise NotImplementedError

    def adapter(self, task: int) -> str:
        """The name of the adapter that the task of that number trains, where there are adapters."""
        return "default"

    def begin_task(self, model: nn.Module, task: int, seed: int) -> None:
        """Prepare what :meth:`apply` gave for the task of that number; the tasks before it have begun."""

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        """The base model's predictions, however far ``model`` has been trained.

        Args:
            model: what :meth:`apply` gave.
            load_model: gives a fresh base model, where there is no other way.

        Returns:
            Given ``input_ids`` of shape ``(1, length)`` and a number, the logits at that many last positions.
        """
        raise NotImplementedError

    def save(self, model: nn.Module, directory: Path) -> int:
        """Save what was trained, but for the heads, and return its size in bytes."""
        raise NotImplementedError
