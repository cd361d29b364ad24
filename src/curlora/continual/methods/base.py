"""The interface of a method."""

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
    """A method of fine-tuning: what is added to the base model, and which parameters are trained.

    Args:
        name: short name, also the name of its folder in the run directory.
        label: the name in reports.
        learning_rate: learning rate of all trainable parameters except the heads.
        options: the method's options; see its class.
        plugins: functions that make the plug-ins combined with the method; called again for every seed.
        training: settings that are different for this method.
        grid: the method's values in the recipe's grid, if it is one of a grid.

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
        """The method's name in recipes."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the options for the report."""
        return self.options

    @property
    def needs_guard_text(self) -> bool:
        """Whether :meth:`apply` uses a general text."""
        return False

    def apply(self, model: nn.Module, seed: int, text: HeldOut | None = None) -> nn.Module:
        """Prepare a fresh base model for training.

        Args:
            model: a causal language model; modified in place.
            seed: the run's seed.
            text: the recipe's ``guard`` text, if it has one.

        Returns:
            The model to train.
        """
        raise NotImplementedError

    def adapter(self, task: int) -> str:
        """Return the name of the adapter that task number ``task`` trains, for methods with adapters."""
        return "default"

    def begin_task(self, model: nn.Module, task: int, seed: int) -> None:
        """Prepare the model from :meth:`apply` for task number ``task``; called for the tasks in order."""

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        """Return a function that computes the base model's logits while ``model`` is trained.

        Args:
            model: the model from :meth:`apply`.
            load_model: returns a fresh base model, for methods that need a second copy.

        Returns:
            A function of ``input_ids`` of shape ``(1, length)`` and a number ``k``. It returns the logits at the last
            ``k`` positions, shape ``(1, k, vocabulary)``.
        """
        raise NotImplementedError

    def save(self, model: nn.Module, directory: Path) -> int:
        """Save the trained parameters without the heads, and return their size in bytes."""
        raise NotImplementedError
