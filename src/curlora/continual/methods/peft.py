"""Any method of PEFT, CURLoRA among them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

import curlora.tuner  # noqa: F401  registers CURLoRA with PEFT
from curlora.continual.methods.base import Method

__all__ = ["Peft", "peft_types"]

# Prompts are put in by PeftModel's own forward, which a task's head is not behind.
_NOT_ADAPTERS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"}
# These need more than a configuration.
_NOT_ADAPTERS |= {"CARTRIDGE", "MIXED", "XLORA", "POLY"}
# Changes its ranks by a call after every step and adds to the loss, neither of which a Trainer does.
_NOT_ADAPTERS |= {"ADALORA"}


def peft_types() -> dict[str, type[PeftConfig]]:
    """The adapters of PEFT, by their names in small letters."""
    members = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    return {str(kind.value).lower(): cls for kind, cls in members if str(kind.value) not in _NOT_ADAPTERS}


@dataclass(frozen=True)
class Peft(Method):
    """An adapter of PEFT.

    ``options`` are those of its configuration class. A CURLoRA adapter draws its columns and rows with the run's seed
    unless ``options`` hold a ``seed``.

    Args:
        peft_type: the adapter's name, such as ``"lora"``, ``"curlora"`` or ``"osf"``.
        lora_start: how LoRA's ``A`` starts: ``"peft"``, or as the paper's ``"reference"`` does it.
    """

    peft_type: str = ""
    lora_start: str = "peft"

    def __post_init__(self) -> None:
        self.configuration(seed=0)

    @property
    def kind(self) -> str:
        return self.peft_type

    def configuration(self, seed: int) -> PeftConfig:
        """The adapter's configuration.

        Raises:
            ValueError: if the adapter or one of its options is unknown, or an option is not allowed.
        """
        config_class = peft_types().get(self.peft_type)
        if config_class is None:
            raise ValueError(f"{self.peft_type!r} is not an adapter of PEFT: {', '.join(sorted(peft_types()))}")
        known = inspect.signature(config_class).parameters
        if "alora_invocation_tokens" in self.options:
            raise ValueError(
                "alora_invocation_tokens: activated LoRA acts in PeftModel's own forward, which is not used"
            )
        for option in self.options:
            if option not in known:
                raise ValueError(f"{config_class.__name__} has no option {option!r}")
        options = {**({"seed": seed} if self.peft_type == "curlora" else {}), **self.options}
        try:
            return config_class(**options)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{config_class.__name__}: {error}") from error

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        adapted: Any = get_peft_model(model, self.configuration(seed))
        if self.lora_start == "reference" and self.peft_type == "lora":
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    for adapter in module.lora_A.values():
                        # kaiming_uniform_(a=sqrt(5)) of an (n x r) matrix takes the rank for its fan-in.
                        bound = 1 / math.sqrt(adapter.weight.shape[0])
                        torch.nn.init.uniform_(adapter.weight, -bound, bound)
        return adapted

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        if self._changes_the_base():
            base: Any = load_model().eval().requires_grad_(False).to(next(model.parameters()).device)
            return lambda ids, kept: base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        peft_model: Any = model

        def logits(ids: Tensor, kept: int) -> Tensor:
            with peft_model.disable_adapter():
                return peft_model.get_base_model()(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

        return logits

    def _changes_the_base(self) -> bool:
        """Whether the adapter switched off is not the base: its weights were changed at the start, or biases are."""
        start = str(self.options.get("init_lora_weights", "")).lower()
        return start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")) or (
            self.options.get("bias", "none") != "none"
        )

    def save(self, model: nn.Module, directory: Path) -> int:
        peft_model: Any = model
        peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        return (directory / "adapter" / SAFETENSORS_WEIGHTS_NAME).stat().st_size
