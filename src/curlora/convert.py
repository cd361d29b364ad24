"""Adapters for what does not know CURLoRA: exactly as LoRA, or merged into the base model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from curlora.hub import no_such_folder
from curlora.tuner.config import CurloraConfig
from curlora.tuner.layer import CurloraLayer

__all__ = ["AdapterError", "adapter_config", "convert_to_lora", "load_with_base", "save_as_lora", "save_merged"]

_PREFIX = "base_model.model."  # of a PeftModel's names, and so of those in an adapter's file
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


class AdapterError(ValueError):
    """A saved adapter, or a model with one, is not what is needed; says what it is and what to do."""


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One or several CURLoRA adapters as one LoRA adapter, exactly.

    A change ``alpha C U R`` of a weight has rank ``r`` and its factors at hand: ``lora_B = alpha C U`` and
    ``lora_A = R``, no decomposition needed. :func:`peft.convert_to_lora` gives the same change by a singular value
    decomposition of each dense ``m x n`` update. Several adapters that are active together add up: their factors are
    put side by side.

    All layers get one rank, the largest, filled up with zeros where theirs is lower, and ``lora_alpha`` is the rank, so
    that the scaling is 1: whatever serves LoRA reads it, those that know no rank by layer among it.

    Args:
        model: with the adapters, such as :func:`peft.get_peft_model` gives.
        adapter_names: the adapters; the active ones if ``None``.

    Returns:
        The configuration, and by the names that PEFT saves them under ``lora_A``, shape ``(r, in_features)``,
        ``lora_B``, shape ``(out_features, r)``, at least float32, and what is trained beside: ``modules_to_save`` and
        the embeddings of tokens.

    Raises:
        AdapterError: if the model has no CURLoRA layer, or no such adapter; if one is merged into the weights; if it
            trained biases, which no LoRA can hold for it; or if one of several trained more than its ``U``.
    """
    layers = {
        name.removeprefix(_PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, CurloraLayer)
    }
    if not layers:
        raise AdapterError("The model has no CURLoRA layer, so there is nothing to convert")
    names = _adapters(layers, adapter_names)
    configs = [config for name in names if (config := getattr(model, "peft_config", {}).get(name)) is not None]
    _check_convertible(layers, configs)

    factors = {}
    for name, layer in layers.items():
        parts = [layer.delta_factors(adapter) for adapter in names if adapter in layer.curlora_U]
        if not parts:
            continue
        left, right = torch.cat([part[0] for part in parts], dim=-1), torch.cat([part[1] for part in parts], dim=-2)
        # A Conv1D holds its weight, and so the update, the other way round.
        factors[name] = (left.mT, right.mT) if _inputs_first(layer) else (right, left)
    rank = max(A.shape[-2] for A, _ in factors.values())
    state = {}
    for name, (A, B) in factors.items():
        missing = rank - A.shape[-2]
        A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
        if A.ndim == 3:  # of experts, which LoRA has one after another in A, and in turn in B
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        state[f"{_PREFIX}{name}.lora_A.weight"] = A.contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = B.contiguous()
    for name in names:
        if isinstance(model, PeftModel) and _trained_beside([model.peft_config[name]]):
            saved = get_peft_model_state_dict(model, adapter_name=name)
            state.update({key: value.contiguous() for key, value in saved.items() if ".curlora_" not in key})

    shared = configs[0] if configs else None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, {name for name in factors if layers[name].parameter_name is None}),
        target_parameters=sorted({layers[name].name for name in factors if layers[name].parameter_name}) or None,
        **_trained_beside(configs),
        fan_in_fan_out=bool(factors) and all(isinstance(layers[name].get_base_layer(), Conv1D) for name in factors),
        base_model_name_or_path=shared and shared.base_model_name_or_path,
        task_type=shared and shared.task_type,
        inference_mode=True,
    )
    return config, state


def save_as_lora(
    path: str | os.PathLike[str], model: nn.Module, adapter_names: str | Sequence[str] | None = None
) -> None:
    """Save what :func:`convert_to_lora` gives as an ordinary LoRA adapter.

    Args:
        path: a folder; made if it is not there.
        model, adapter_names: as for :func:`convert_to_lora`.

    Raises:
        AdapterError: as :func:`convert_to_lora`; nothing is written then.
    """
    config, state = convert_to_lora(model, adapter_names)
    Path(path).mkdir(parents=True, exist_ok=True)
    # Two layers may share a weight, and so a factor; a file holds each tensor once.
    save_file({key: value.clone() for key, value in state.items()}, Path(path) / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(path))


def save_merged(path: str | os.PathLike[str], model: PeftModel) -> None:
    """Add the active adapters to the base weights and save the model, with its tokenizer if it is at hand.

    In the weights' own dtype, so that half precision rounds the update. The model is of no more use as one with
    adapters.

    Args:
        path: a folder; made if it is not there.
        model: as :func:`load_with_base` gives it.

    Raises:
        AdapterError: if a merged weight would not be finite; nothing is written then.
    """
    source = model.get_base_model().config.name_or_path
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    merged.save_pretrained(path)
    with contextlib.suppress(OSError, ValueError):  # a model may well come without one
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(path)


def load_with_base(adapter: str, base: str | None = None) -> PeftModel:
    """A saved CURLoRA adapter on its base model, in the dtype that the base is stored in.

    Args:
        adapter: a folder, or a hub id.
        base: the base model's folder or hub id; what the adapter says if ``None``.

    Raises:
        AdapterError: if it is no CURLoRA adapter, does not say its base, or does not fit it.
        OSError: if either cannot be read.
    """
    config = adapter_config(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{adapter} does not say what its base model is: name it")
    if problem := no_such_folder(base):
        raise AdapterError(f"The base model of {adapter}: {problem}. Say where it is now.")
    try:
        model = _class_of(config).from_pretrained(base, dtype="auto")
        return PeftModel.from_pretrained(model, adapter).eval()
    except ValueError as error:  # PEFT's and our own, of what does not fit
        raise AdapterError(f"{adapter}: {error}") from error


def adapter_config(adapter: str) -> CurloraConfig:
    """The configuration of a saved CURLoRA adapter.

    Raises:
        AdapterError: if there is none, or it is of another method.
        OSError: if it cannot be read.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{adapter}: its adapter_config.json is damaged ({error})") from error
    except ValueError as error:
        raise AdapterError(f"{adapter}: {error}") from error
    if not isinstance(config, CurloraConfig):
        raise AdapterError(f"{adapter} is an adapter of type {config.peft_type.value}, not CURLORA")
    return config


def _class_of(config: PeftConfig) -> Any:
    if config.task_type:
        return getattr(transformers, _AUTO_CLASSES[config.task_type])
    # PEFT notes the class of the base model. By name and from transformers alone: a file must not say what to import.
    name = (config.auto_mapping or {}).get("base_model_class", "")
    found = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModelForCausalLM


def _inputs_first(layer: CurloraLayer) -> bool:
    """Whether the weight is stored as ``(in_features, out_features)``."""
    if layer.parameter_name is None:
        return layer.fan_in_fan_out
    stacked = len(layer.weight_shape) == 3
    return stacked and bool(getattr(layer.get_base_layer(), "is_transposed", False))


def _adapters(layers: dict[str, CurloraLayer], wanted: str | Sequence[str] | None) -> list[str]:
    present = list(dict.fromkeys(name for layer in layers.values() for name in layer.curlora_U))
    if wanted is None:
        active: Any = next(iter(layers.values())).active_adapters  # one list for the whole model
        return [name for name in present if name in active]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in present]
    if unknown or not names:
        raise AdapterError(f"There is no adapter {unknown or names!r}; there are {present}")
    return list(dict.fromkeys(names))


def _check_convertible(layers: dict[str, CurloraLayer], configs: Sequence[PeftConfig]) -> None:
    merged = next((layer for layer in layers.values() if layer.merged), None)
    if merged is not None:
        raise AdapterError(
            f"{merged.merged_adapters} is merged into the weights, whose columns and rows are needed as they were. "
            "Unmerge first."
        )
    biases = [config.bias for config in configs if config.bias != "none"]
    if biases:
        raise AdapterError(f"The adapter trained biases (bias={biases[0]!r}), which are no part of a LoRA update")
    beside = _trained_beside(configs)
    if len(configs) > 1 and beside:
        raise AdapterError(
            f"Several adapters cannot be one where some trained more than U ({', '.join(beside)}): convert them apart"
        )


def _trained_beside(configs: Sequence[PeftConfig]) -> dict[str, Any]:
    """The options of the first adapter that has any by which more than ``U`` is trained, and goes along with it."""
    for config in configs:
        options = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
        if given := {name: value for name, value in options.items() if value}:
            return given
    return {}


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """The adapted layers by the last part of their names, or by all of it where another layer shares that part."""
    last = {name.rpartition(".")[2] for name in adapted}
    alike = {
        name.removeprefix(_PREFIX)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in last and not isinstance(module, (nn.ParameterDict, nn.ModuleDict))
    }
    return sorted(last if alike == adapted else adapted)
