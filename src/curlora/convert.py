"""Export of CURLoRA adapters to other tools: as an exact LoRA adapter, or merged into the base model."""

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
from curlora.tuner.config import AUTO_CLASSES, CurloraConfig
from curlora.tuner.layer import CurloraLayer

__all__ = [
    "AdapterError",
    "adapter_config",
    "config_of",
    "convert_to_lora",
    "load_with_base",
    "save_as_lora",
    "save_merged",
]

_PREFIX = "base_model.model."  # prefix of the names in a PeftModel, and of those in an adapter's file


class AdapterError(ValueError):
    """A saved adapter, or a model with an adapter, cannot be used. The message says why and what to do."""


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert one or several CURLoRA adapters to one LoRA adapter, exactly.

    The update ``alpha C U R`` of a weight is already a product of two factors of rank ``r``: ``lora_B = alpha C U`` and
    ``lora_A = R``. No decomposition is needed, while :func:`peft.convert_to_lora` takes a singular value decomposition
    of each dense update of shape ``(m, n)``. The updates of several adapters add up: their factors are concatenated.

    All layers get the same rank, the largest one. Factors of a lower rank are padded with zeros. ``lora_alpha`` equals
    the rank, so that the scaling is 1. So the adapter can also be served by tools that do not support a rank per layer.

    Args:
        model: a model with CURLoRA adapters, such as :func:`peft.get_peft_model` returns.
        adapter_names: the adapters to convert; the active ones if ``None``.

    Returns:
        The LoRA configuration and the state dict, under the names that PEFT saves. It has ``lora_A``, shape
        ``(r, in_features)``, and ``lora_B``, shape ``(out_features, r)``, at least float32; of an embedding
        ``lora_embedding_A``, shape ``(r, num_embeddings)``, and ``lora_embedding_B``. It also has what was
        trained besides ``U``: ``modules_to_save`` and the embeddings of tokens.

    Raises:
        AdapterError: if the model has no CURLoRA layer or no such adapter, if none is given and none is active, if an
            adapter is merged into the weights, if an adapter trained biases, or if several adapters are given and one
            trained more than its ``U``.
    """
    layers = {
        name.removeprefix(_PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, CurloraLayer)
    }
    if not layers:
        raise AdapterError("The model has no CURLoRA layer, so there is nothing to convert: load a CURLoRA adapter.")
    names = _adapters(layers, adapter_names)
    configs = [config for name in names if (config := getattr(model, "peft_config", {}).get(name)) is not None]
    _check_convertible(layers, configs)

    factors = {}
    for name, layer in layers.items():
        parts = [layer.delta_factors(adapter) for adapter in names if adapter in layer.curlora_U]
        if not parts:
            continue
        left, right = torch.cat([part[0] for part in parts], dim=-1), torch.cat([part[1] for part in parts], dim=-2)
        # A Conv1D stores its weight, and so the update, transposed.
        factors[name] = (left.mT, right.mT) if _inputs_first(layer) else (right, left)
    rank = max(A.shape[-2] for A, _ in factors.values())
    state = {}
    for name, (A, B) in factors.items():
        missing = rank - A.shape[-2]
        A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
        if A.ndim == 3:  # LoRA stores the experts one after another in A, and interleaved in B
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        embedding = isinstance(layers[name].get_base_layer(), nn.Embedding)  # LoRA names its factors differently
        names_of = "lora_embedding_{}" if embedding else "lora_{}.weight"
        for side, factor in zip("AB", (A, B), strict=True):
            state[f"{_PREFIX}{name}.{names_of.format(side)}"] = factor.contiguous()
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
    """Convert adapters with :func:`convert_to_lora` and save the result as an ordinary LoRA adapter.

    Args:
        path: a folder; created if it does not exist.
        model, adapter_names: as for :func:`convert_to_lora`.

    Raises:
        AdapterError: as :func:`convert_to_lora`. Nothing is written then.
    """
    config, state = convert_to_lora(model, adapter_names)
    Path(path).mkdir(parents=True, exist_ok=True)
    # Layers that share a weight also share a factor. safetensors refuses shared memory, so every tensor is cloned.
    save_file({key: value.clone() for key, value in state.items()}, Path(path) / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(path))


def save_merged(path: str | os.PathLike[str], model: PeftModel) -> None:
    """Merge the active adapters into the base weights and save the model, with its tokenizer if there is one.

    The update is added in the weights' dtype, so half precision rounds it. Do not use ``model`` afterwards: its
    adapters are gone.

    Args:
        path: a folder; created if it does not exist.
        model: a model as :func:`load_with_base` returns it.

    Raises:
        AdapterError: if a merged weight would not be finite. Nothing is written then.
    """
    source = model.get_base_model().config.name_or_path
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    merged.save_pretrained(path)
    with contextlib.suppress(OSError, ValueError):  # a model may come without a tokenizer
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(path)


def load_with_base(adapter: str, base: str | None = None) -> PeftModel:
    """Load a saved CURLoRA adapter on its base model, in the dtype in which the base model is stored.

    Args:
        adapter: the adapter's folder or hub id.
        base: the base model's folder or hub id; the one that the adapter names if ``None``.

    Raises:
        AdapterError: if ``adapter`` is no CURLoRA adapter, names no base model, or does not fit its base model.
        OSError: if the adapter or the base model cannot be read.
    """
    config = adapter_config(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{adapter} does not name its base model: give the base model's folder or hub id.")
    if problem := no_such_folder(base):
        raise AdapterError(f"The base model of {adapter}: {problem}. Give the base model's present folder or hub id.")
    try:
        model = _class_of(config).from_pretrained(base, dtype="auto")
        return PeftModel.from_pretrained(model, adapter).eval()
    except ValueError as error:  # raised by PEFT and curlora if the adapter does not fit
        raise AdapterError(f"{adapter}: {error}") from error


def adapter_config(adapter: str) -> CurloraConfig:
    """Return the configuration of a saved CURLoRA adapter.

    Raises:
        AdapterError: if there is no configuration, or it is damaged or of another method.
        OSError: if it cannot be read.
    """
    found: CurloraConfig = config_of(adapter, CurloraConfig)
    return found


def config_of(adapter: str, *kinds: type[PeftConfig]) -> Any:
    """Return the configuration of a saved adapter of one of several methods.

    Raises:
        AdapterError: if there is no configuration, or it is damaged or of another method.
        OSError: if it cannot be read.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"{adapter}: its adapter_config.json is damaged ({error}). Copy or download it again."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{adapter}: {error}") from error
    if not isinstance(config, kinds):
        wanted = " or ".join(kind().peft_type.value for kind in kinds)
        raise AdapterError(
            f"{adapter} is an adapter of type {config.peft_type.value}, not {wanted}. Give an adapter of this type."
        )
    return config


def _class_of(config: PeftConfig) -> Any:
    if config.task_type:
        return getattr(transformers, AUTO_CLASSES[config.task_type])
    # PEFT saves the name of the base model's class. It is looked up only in transformers: a file must not decide what
    # is imported.
    name = (config.auto_mapping or {}).get("base_model_class", "")
    found = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModelForCausalLM


def _inputs_first(layer: CurloraLayer) -> bool:
    """Return whether the weight is stored as ``(in_features, out_features)``."""
    if layer.parameter_name is None:
        return layer.fan_in_fan_out
    stacked = len(layer.weight_shape) == 3
    return stacked and bool(getattr(layer.get_base_layer(), "is_transposed", False))


def _adapters(layers: dict[str, CurloraLayer], wanted: str | Sequence[str] | None) -> list[str]:
    present = list(dict.fromkeys(name for layer in layers.values() for name in layer.curlora_U))
    if wanted is None:
        active: Any = next(iter(layers.values())).active_adapters  # the same in every layer
        if found := [name for name in present if name in active]:
            return found
        raise AdapterError(
            f"None of the CURLoRA adapters {present} is active: name those to convert, or activate them with "
            "set_adapter."
        )
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in present]
    if unknown or not names:
        raise AdapterError(f"There is no adapter {unknown or names!r}; there are {present}. Name some of these.")
    return list(dict.fromkeys(names))


def _check_convertible(layers: dict[str, CurloraLayer], configs: Sequence[PeftConfig]) -> None:
    merged = next((layer for layer in layers.values() if layer.merged), None)
    if merged is not None:
        raise AdapterError(
            f"{merged.merged_adapters} is merged into the weights, but the columns and rows of the unmerged weights "
            "are needed. Unmerge first."
        )
    biases = [config.bias for config in configs if config.bias != "none"]
    if biases:
        raise AdapterError(
            f"The adapter trained biases (bias={biases[0]!r}), which a LoRA update cannot hold. Merge the adapter into "
            "the base model instead, or train one with bias='none'."
        )
    beside = _trained_beside(configs)
    if len(configs) > 1 and beside:
        raise AdapterError(
            f"Several adapters cannot be converted to one, since some trained more than U ({', '.join(beside)}). "
            "Convert each by itself."
        )


def _trained_beside(configs: Sequence[PeftConfig]) -> dict[str, Any]:
    """Return the options with which an adapter trained more than ``U``, which the LoRA adapter takes over.

    If several adapters did so, the options are those of the first. If none did, there are no options.
    """
    for config in configs:
        options = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
        if given := {name: value for name, value in options.items() if value}:
            return given
    return {}


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Return names of the adapted layers: only their last parts, or their full names if another module shares one."""
    last = {name.rpartition(".")[2] for name in adapted}
    alike = {
        name.removeprefix(_PREFIX)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in last and not isinstance(module, (nn.ParameterDict, nn.ModuleDict))
    }
    return sorted(last if alike == adapted else adapted)
