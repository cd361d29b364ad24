"""The adapter that trains under a budget, and whether it can have one."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from curlora.errors import GuardError
from curlora.guard.calibration import adapter_of
from curlora.text.evaluating import changes_the_base, without_adapters
from curlora.tuner.config import CurloraConfig
from curlora.tuner.format import saved_U
from curlora.tuner.layer import CurloraLayer

__all__ = ["add_how_to_load", "in_half_precision", "keep_in_float32", "trained_adapter"]

_UNTRAINED = "The adapter has no trained parameters. Load it with PeftModel.from_pretrained(..., is_trainable=True)."
_HALF = (torch.bfloat16, torch.float16)
_WITHOUT_PERPLEXITY = {
    name
    for names in (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    for name in names.values()
} - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def trained_adapter(model: nn.Module, adapter: str | None) -> tuple[str, bool]:
    """Return the name of the adapter that trains, and whether it is a CURLoRA adapter.

    Args:
        model: the model with its adapters.
        adapter: the adapter's name; the active one if ``None``.

    Raises:
        GuardError: if the model is an encoder-decoder, if it has no such adapter, if not exactly one CURLoRA adapter is
            active, or if disabling another adapter does not give the base model.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise GuardError(
            f"{type(base).__name__} is an encoder-decoder, whose forgetting cannot be measured. Use a causal language "
            "model."
        )
    if type(base).__name__ in _WITHOUT_PERPLEXITY:
        raise GuardError(
            f"{type(base).__name__} does not predict the next token, so it has no perplexity that a budget could "
            "limit. Use a causal language model."
        )
    guarded = _guarded(model, adapter)
    if guarded is not None:
        _check_nothing_else_trains(model)
        return guarded, True
    assert isinstance(model, PeftModel)
    active = list(model.active_adapters)
    if adapter is not None and adapter not in active:
        raise GuardError(f"{adapter!r} is not an active adapter of this model; {active} are active. Name one of these.")
    _check_base(model)
    return adapter or active[0], False


def in_half_precision(model: nn.Module) -> bool:
    """Return whether a trained ``U`` is in half precision."""
    return any(
        U.requires_grad and U.dtype in _HALF
        for layer in model.modules()
        if isinstance(layer, CurloraLayer)
        for U in layer.curlora_U.parameters()
    )


def keep_in_float32(model: nn.Module) -> None:
    """Convert trained ``U`` in half precision to float32, and undo the rounding where the exact values are known.

    TRL casts the trained parameters of a quantized base model to bfloat16, where small steps round to zero. An adapter
    that was trained before has lost digits by then. They are read again from its file, or from where the last training
    within a budget has left them.
    """
    rounded = []

    @functools.cache
    def saved(name: str) -> dict[str, Tensor]:
        file = getattr(getattr(model, "peft_config", {}).get(name), "weights_file", None)
        return {} if file is None else saved_U(file)

    layers = {path: module for path, module in model.named_modules() if isinstance(module, CurloraLayer)}
    for path, layer in layers.items():
        for name, matrix in layer.matrices.items():
            U = matrix.weight
            if not (U.requires_grad and U.dtype in _HALF):
                continue
            known = [matrix.trained, saved(name).get(path.removeprefix("base_model.model."))]
            exact = next((one for one in known if one is not None and _rounds_to(one, U)), None)
            if exact is None and bool(U.any()):
                rounded.append(layer.name)
            U.data = U.data.float() if exact is None else exact.to(device=U.device, dtype=torch.float32)
    if rounded:
        warnings.warn(
            f"U of {len(rounded)} layers (the first is {rounded[0]}) has been rounded to half precision, as TRL does "
            "on a quantized base model, and its exact values are not known. Save the adapter before, and load it for "
            "this training.",
            stacklevel=4,
        )


def add_how_to_load(model: nn.Module, folder: Path) -> None:
    """Let the model card in a folder say how to load the model's CURLoRA adapter, if it has one."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, CurloraConfig):
            config.add_how_to_load(folder, {"base_model_class": type(base).__name__})


def _rounds_to(exact: Tensor, U: Tensor) -> bool:
    return exact.shape == U.shape and torch.equal(exact.to(device=U.device).to(U.dtype), U.detach())


def _guarded(model: nn.Module, adapter: str | None) -> str | None:
    """Return the name of the CURLoRA adapter that trains, or ``None`` if another kind of adapter does."""
    curlora = {name for layer in model.modules() if isinstance(layer, CurloraLayer) for name in layer.curlora_U}
    if not isinstance(model, PeftModel):
        if curlora:
            return adapter_of(model, adapter)
        raise GuardError(
            "The model has no adapter. Add one first: get_peft_model(model, CurloraConfig(...)) or "
            "get_peft_model(model, LoraConfig(...))."
        )
    named = {adapter} if adapter is not None else set(model.active_adapters)
    return adapter_of(model, adapter) if curlora & named else None


def _check_nothing_else_trains(model: nn.Module) -> None:
    """Check that only ``U`` of CURLoRA adapters is trained.

    Raises:
        GuardError: if anything else is: the guard would not count what it forgets, and scaling ``U`` back would not
            undo it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GuardError(_UNTRAINED)
    layers = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    counted = {id(parameter) for layer in layers for parameter in layer.curlora_U.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in counted]
    if others:
        raise GuardError(
            f"{len(others)} trained parameters are not part of U (the first is {others[0]}). The budget of a CURLoRA "
            "adapter counts and scales back only U. Leave out modules_to_save, trainable_token_indices and bias, "
            "freeze other adapters, or train with LoRA, whose budget covers modules_to_save."
        )


def _check_base(model: PeftModel) -> None:
    """Check that an adapter trains, and that disabling all adapters gives the base model.

    Raises:
        GuardError: if nothing is trained, if parameters outside the adapters are trained, if an adapter is a prompt, or
            if an adapter's initialization has changed the base model's weights.
    """
    for name, config in model.peft_config.items():
        init = getattr(config, "init_lora_weights", None)
        if changes_the_base(init):
            raise GuardError(
                f"Adapter {name!r} has init_lora_weights={init!r}, which changes the base model's weights, so the base "
                "model is not there to compare with. Use another initialization, such as True."
            )
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise GuardError(
            f"{kind} trains a prompt, which a penalty on texts does not reach. Use LoRA, CURLoRA or another adapter of "
            "the model's layers."
        )
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not before:
        raise GuardError(_UNTRAINED)
    with without_adapters(model):
        outside = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name in before]
    if outside:
        raise GuardError(
            f"{len(outside)} trained parameters are not part of an adapter (the first is {outside[0]}). Once they have "
            "changed, the base model is not there to compare with. Freeze them: for LoRA, use bias='none'."
        )
