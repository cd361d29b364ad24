"""The adapters of PEFT, CURLoRA among them."""

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
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

import curlora.tuner  # noqa: F401  registers CURLoRA with PEFT
from curlora.continual.heldout import HeldOut
from curlora.continual.methods.base import Method
from curlora.continual.problems import unknown_names
from curlora.text.evaluating import changes_the_base, without_adapters

__all__ = ["REFUSED_OPTIONS", "Peft", "peft_types"]

# Options that PEFT has and a run refuses, with the reason.
REFUSED_OPTIONS = {
    "alora_invocation_tokens": "activated LoRA needs PeftModel's own forward, which is not used here",
}

# PeftModel's own forward inserts the prompts, and a task's head does not use that forward.
_NOT_ADAPTERS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"}
# These need more than a configuration.
_NOT_ADAPTERS |= {"CARTRIDGE", "MIXED", "XLORA", "POLY"}
# AdaLoRA needs a call after every step that changes its ranks, and a term in the loss. A Trainer does neither.
_NOT_ADAPTERS |= {"ADALORA"}


# Adapters whose updates add up if a layer has several of them, and which do not change the base model; and the options
# for which this holds.
_SUMS = ("curlora", "lora")
_SUMMING = {
    "r", "alpha", "lora_alpha", "lora_dropout", "use_rslora", "sampling", "replacement", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "task_type",
}  # fmt: skip


def peft_types() -> dict[str, type[PeftConfig]]:
    """Return the configuration classes of PEFT's adapters by their names in lower case."""
    members = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    return {str(kind.value).lower(): cls for kind, cls in members if str(kind.value) not in _NOT_ADAPTERS}


@dataclass(frozen=True)
class Peft(Method):
    """An adapter of PEFT.

    ``options`` are those of its configuration class. A CURLoRA adapter draws its columns and rows with the run's seed
    unless ``options`` hold a ``seed``. With ``adapter_per_task`` the later adapters use a seed derived from the run's
    seed and the task's number.

    Args:
        peft_type: the adapter's name, such as ``"lora"``, ``"curlora"`` or ``"osf"``.
        lora_init: how LoRA's ``A`` is initialized: as in ``"peft"`` or as in the paper's ``"reference"`` code.
        adapter_per_task: whether each task trains its own adapter. The adapters of earlier tasks stay active and
            frozen. The adapters are named ``task0``, ``task1`` and so on.

    Raises:
        ValueError: if the adapter or one of its options is unknown, an option is not allowed, or ``adapter_per_task``
            is set for adapters whose updates do not add up.
    """

    peft_type: str = ""
    lora_init: str = "peft"
    adapter_per_task: bool = False

    def __post_init__(self) -> None:
        self.configuration(seed=0)
        if not self.adapter_per_task:
            return
        if self.peft_type not in _SUMS:
            raise ValueError(f"adapter_per_task is for {' and '.join(_SUMS)}, whose updates add up")
        if other := sorted(self.options.keys() - _SUMMING):
            raise ValueError(
                f"adapter_per_task: leave out the option {other[0]}. Each adapter must be drawn separately, start from "
                f"zero change, and add to the others, which holds for the options {', '.join(sorted(_SUMMING))}"
            )

    @property
    def kind(self) -> str:
        return self.peft_type

    def describe(self) -> dict[str, Any]:
        return {**self.options, **({"adapter_per_task": True} if self.adapter_per_task else {})}

    def configuration(self, seed: int) -> PeftConfig:
        """Return the adapter's configuration.

        Raises:
            ValueError: if the adapter or one of its options is unknown, or an option is not allowed.
        """
        config_class = peft_types().get(self.peft_type)
        if config_class is None:
            raise ValueError(f"{self.peft_type!r} is not an adapter of PEFT: {', '.join(sorted(peft_types()))}")
        known = inspect.signature(config_class).parameters
        for option in REFUSED_OPTIONS.keys() & self.options.keys():
            raise ValueError(f"{option}: {REFUSED_OPTIONS[option]}; leave it out")
        if unknown := [option for option in self.options if option not in known]:
            raise ValueError(f"options: {unknown_names(config_class.__name__, unknown, known, 'option')}")
        options = {**({"seed": seed} if self.peft_type == "curlora" else {}), **self.options}
        try:
            if self.needs_guard_text:
                options["corda_config"] = CordaConfig(**{"corda_method": "kpm", **options.get("corda_config", {})})
                if (kind := options["corda_config"].corda_method) not in ("kpm", "ipm"):
                    raise ValueError(f"corda_method must be kpm (keeps knowledge) or ipm, got {kind!r}")
            return config_class(**options)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"options: {config_class.__name__}: {error}") from error

    @property
    def needs_guard_text(self) -> bool:
        return self.options.get("init_lora_weights") == "corda"

    def apply(self, model: nn.Module, seed: int, text: HeldOut | None = None) -> nn.Module:
        config = self.configuration(seed)
        if self.needs_guard_text:
            if text is None:
                raise ValueError("CorDA needs a general text: name one under guard")
            _prepare_corda(model, config, text)
        adapted = get_peft_model(model, config, adapter_name=self.adapter(0))
        self._start_lora(adapted, self.adapter(0))
        return adapted

    def adapter(self, task: int) -> str:
        return f"task{task}" if self.adapter_per_task else "default"

    def begin_task(self, model: nn.Module, task: int, seed: int) -> None:
        """Add the task's adapter if each task has one. The same seed and task always give the same adapter."""
        if not self.adapter_per_task or task == 0:
            return
        peft_model: Any = model
        name = self.adapter(task)
        with torch.random.fork_rng(devices=[]):
            seed = ((seed + 1) * 1_000_003 + task) % 2**32
            torch.manual_seed(seed)
            peft_model.add_adapter(name, self.configuration(seed))
            self._start_lora(model, name)
        peft_model.base_model.set_adapter([self.adapter(number) for number in range(task + 1)])
        for number in range(task):
            peft_model.set_requires_grad(self.adapter(number), requires_grad=False)

    def _start_lora(self, model: nn.Module, adapter: str) -> None:
        if self.lora_init != "reference" or self.peft_type != "lora":
            return
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # The reference calls kaiming_uniform_(a=sqrt(5)) on an (n, r) matrix, so the rank is its fan-in.
                weight = module.lora_A[adapter].weight
                torch.nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[0]), 1 / math.sqrt(weight.shape[0]))

    def base_logits(self, model: nn.Module, load_model: Callable[[], nn.Module]) -> Callable[[Tensor, int], Tensor]:
        if self.changes_the_base or self.options.get("bias", "none") != "none":
            base: Any = load_model().eval().requires_grad_(False).to(next(model.parameters()).device)
            return lambda ids, kept: base(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        peft_model: Any = model

        def logits(ids: Tensor, kept: int) -> Tensor:
            with without_adapters(peft_model):
                return peft_model.get_base_model()(input_ids=ids, logits_to_keep=kept, use_cache=False).logits

        return logits

    @property
    def changes_the_base(self) -> bool:
        """Whether the adapter changes the base model's weights when it is made."""
        return changes_the_base(self.options.get("init_lora_weights"))

    def save(self, model: nn.Module, directory: Path) -> int:
        peft_model: Any = model
        # One adapter goes into the folder itself; several go into a subfolder each.
        peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        return sum(file.stat().st_size for file in (directory / "adapter").rglob(SAFETENSORS_WEIGHTS_NAME))


def _prepare_corda(model: nn.Module, config: Any, text: HeldOut) -> None:
    """Run CorDA's decomposition of the weights on a text (Yang et al. 2024, https://arxiv.org/abs/2406.05223).

    In the knowledge-preserving mode, the default here, the adapter starts as the part of the weights that the text uses
    least.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def run() -> None:
        for piece in text.pieces():
            model(input_ids=piece.to(device)[None], use_cache=False)

    model.eval()
    preprocess_corda(model, config, run_model=run)
