"""The restraint of LoRA and other adapters of PEFT: a penalty on the KL divergence from the base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from curlora.budget.examples import Examples
from curlora.budget.learning_rate import lora_learning_rate_of
from curlora.budget.restraint import Restraint
from curlora.callbacks.kl_to_base import adapter_base_logits, kl_to_base, pieces_of
from curlora.callbacks.penalty import PenaltyCallback
from curlora.callbacks.strength import Strength
from curlora.guard.errors import GuardError
from curlora.guard.evaluating import without_adapters
from curlora.guard.texts import Rows

__all__ = ["PenaltyRestraint"]

# Initializations that change the base model's weights when they are made, so that it is not there to compare with.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PenaltyRestraint(Restraint):
    """Adds the KL divergence from the base model on a row of the texts to every step.

    The base model is the model with its adapters disabled. Each text's penalty becomes as strong as it takes to keep
    its divergence within the text's limit (:class:`curlora.callbacks.Strength`).

    Args:
        model, adapter, rows: see :class:`curlora.budget.restraint.Restraint`.
        examples: the task's examples.
        strength: the lowest strength of the penalty.

    Raises:
        GuardError: if the base model cannot be had by disabling the adapter.
    """

    moved: ClassVar[str] = "the adapter"

    def __init__(
        self, model: nn.Module, adapter: str, rows: Mapping[str, Rows], examples: Examples, *, strength: float
    ) -> None:
        super().__init__(model, adapter, rows)
        _check_base(model, adapter)
        self.examples, self.strength = examples, strength
        self._penalty: _Penalty | None = None
        self._lifetime: float | None = None

    @property
    def lifetime(self) -> float | None:
        return self._lifetime

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def rated(self) -> Sequence[Tensor]:
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]

    def prepare(self, lifetime: float | None) -> None:
        self.examples.check()
        self._lifetime = lifetime

    def as_base(self) -> AbstractContextManager[None]:
        return without_adapters(self.model)

    def set_limits(self, limits: Mapping[str, float], otherwise: float) -> None:
        nats = {name: math.log1p(limits.get(name, otherwise)) for name in self.rows}
        strengths = {name: Strength(self.strength, limit, f"strength on {name}") for name, limit in nats.items()}
        self._penalty = _Penalty(self.rows, strengths)

    def learning_rate(self, steps: int) -> float | None:
        return lora_learning_rate_of(self.model, self.adapter)

    @property
    def penalty(self) -> _Penalty:
        """The penalty, after :meth:`set_limits`."""
        assert self._penalty is not None
        return self._penalty

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty.on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.penalty.on_step_end(args, state, control, **kwargs)

    def logs(self) -> dict[str, float]:
        return self.penalty.logs()


class _Penalty(PenaltyCallback):
    """The divergence on a row of one of the texts, times the text's strength.

    Args:
        rows: the texts by name.
        strengths: the texts' strengths.
    """

    def __init__(self, rows: Mapping[str, Rows], strengths: Mapping[str, Strength]) -> None:
        super().__init__()
        self.strengths = strengths
        named = [(place / len(pieces), name, piece) for name, text in rows.items() for pieces in [pieces_of(text)]
                 for place, piece in enumerate(pieces)]  # fmt: skip
        named.sort(key=lambda one: one[0])  # a short training sees as large a share of each text
        self.pieces = [(name, *piece) for _, name, piece in named]

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        name, row, counted = self.pieces[step % len(self.pieces)]
        return self.strengths[name].of(kl_to_base(model, row, counted, adapter_base_logits(model)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        for strength in self.strengths.values():
            strength.begin(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for strength in self.strengths.values():
            strength.step(state)

    def logs(self) -> dict[str, float]:
        """Return the mean divergence of the last steps on each text, and the strength of its penalty."""
        found: dict[str, float] = {}
        for name, strength in self.strengths.items():
            if strength.mean is not None:
                found |= {f"kl_to_base/{name}": strength.mean, f"kl_strength/{name}": strength.value}
        return found


def _check_base(model: nn.Module, adapter: str) -> None:
    """Check that disabling the adapters gives the base model.

    Raises:
        GuardError: if parameters outside the adapters are trained, or the adapter's initialization has changed the base
            model's weights.
    """
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with without_adapters(model):
        outside = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name in before]
    if outside:
        raise GuardError(
            f"{len(outside)} trained parameters are not part of an adapter (the first is {outside[0]}). Once they have "
            "changed, the base model is not there to compare with. Freeze them: for LoRA, use bias='none'."
        )
    configs: Any = getattr(model, "peft_config", {})
    init = getattr(configs.get(adapter), "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise GuardError(
            f"init_lora_weights={init!r} changes the base model's weights, so the base model is not there to compare "
            "with. Use another initialization, such as True."
        )
