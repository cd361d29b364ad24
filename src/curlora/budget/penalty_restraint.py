"""The restraint of LoRA and other adapters of PEFT: a penalty on the KL divergence from the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from curlora.budget.examples import Examples
from curlora.budget.learning_rate import lora_learning_rate_of
from curlora.budget.restraint import Restraint
from curlora.callbacks.kl_to_base import KLToBaseCallback
from curlora.text.evaluating import without_adapters
from curlora.text.rows import Rows

__all__ = ["PenaltyRestraint"]


class PenaltyRestraint(Restraint):
    """Adds the KL divergence from the base model on a few rows of the texts to every step.

    The base model is the model with its adapters disabled. The strength does not depend on the limits, which the
    scaling back holds: on GSM8K both led along the same front of what is learned and forgotten (docs/research.md).

    Args:
        model, adapter, rows: see :class:`curlora.budget.restraint.Restraint`.
        examples: the task's examples.
        strength, rows_per_step: see :class:`curlora.callbacks.KLToBaseCallback`.
    """

    moved: ClassVar[str] = "the adapter"

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        rows: Mapping[str, Rows],
        examples: Examples,
        *,
        strength: float,
        rows_per_step: int,
    ) -> None:
        super().__init__(model, adapter, rows)
        self.examples = examples
        self.penalty = KLToBaseCallback(Rows.joined(rows.values()), strength, rows_per_step=rows_per_step)
        self._found: list[float] = []

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def rated(self) -> Sequence[Tensor]:
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]

    def prepare(self, lifetime: float | None) -> float | None:
        self.examples.check()
        return lifetime

    def as_base(self) -> AbstractContextManager[None]:
        return without_adapters(self.model)

    def learning_rate(self, steps: int) -> float | None:
        return lora_learning_rate_of(self.model, self.adapter)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty.on_step_begin(args, state, control, **kwargs)
        assert self.penalty.value is not None
        self._found.append(self.penalty.value / self.penalty.strength)

    def logs(self) -> dict[str, float]:
        """Return the mean divergence of the steps since the last log, each on its rows."""
        found, self._found = self._found, []
        return {"kl_to_base": sum(found) / len(found)} if found else {}
