"""An adapter that is loaded: refused if it does not fit, before anything changes; after it the columns are the base's.

What :func:`check` reads of the weights :func:`follow` takes over, once the file's numbers are in the model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curlora.tuner.fingerprint import LENGTH, compare, compare_layers
from curlora.tuner.saved import problem_of_indices
from curlora.tuner.weight import device_of

if TYPE_CHECKING:
    from curlora.tuner.layer import CurloraLayer

__all__ = ["check", "follow", "has_no_numbers"]


def check(layers: Mapping[str, CurloraLayer], adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse, before anything is loaded, what does not fit the model.

    Args:
        layers: those that hold the adapter, by name.
        adapter_name: the adapter's name.
        state_dict: what is about to be loaded, with the adapter's name in its names.

    Raises:
        ValueError: naming the layers and what is wrong with them.
    """
    # A state dict does not have the prefix that FSDP puts into the names of modules.
    layers = {name.removeprefix("_fsdp_wrapped_module."): layer for name, layer in layers.items()}
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be loaded while adapters are merged into the weights that it refers to "
            f"({_first_few(merged)}). Unmerge first."
        )
    problems: list[str] = []
    fingerprints: dict[str, tuple[Tensor, Tensor]] = {}
    read: dict[CurloraLayer, tuple[Tensor, Tensor, Tensor]] = {}
    expected = set()
    for name, layer in layers.items():
        keys = [f"{name}.{part}.{adapter_name}" for part in ("curlora_U", "curlora_indices", "curlora_fingerprint")]
        expected.update(keys)
        missing = [key for key in keys if key not in state_dict]
        if missing:
            problems.append(f"{missing[0]} is missing")
            continue
        U, indices, saved = (state_dict[key] for key in keys)
        problem = _find_problem(layer, layer.r[adapter_name], U, indices, saved)
        if problem:
            problems.append(f"{name}: {problem}")
        elif device_of(layer.get_base_layer()).type != "meta":
            factor, current = layer.take(indices)
            fingerprints[name] = saved, current
            read[layer] = indices, factor, current
    ours = re.compile(r"\.curlora_(U|indices|fingerprint)(\.|$)")
    problems += [f"{key} belongs to no adapted layer" for key in state_dict if ours.search(key) and key not in expected]

    left = f"{adapter_name!r} is on the model as it was before the load; delete_adapter({adapter_name!r}) removes it."
    if has_no_numbers(layers, adapter_name):
        left = "The model is as it was."
    if problems:
        raise ValueError(f"The adapter does not fit this model and was not loaded: {_first_few(problems)}. {left}")
    verdicts = compare_layers(fingerprints)
    other_base, other_precision = (
        [name for name, verdict in verdicts.items() if verdict == kind] for kind in ("other", "precision")
    )
    if other_base:
        raise ValueError(
            "The adapter was made on another base model, or on this one before its weights changed or were rounded, "
            f"and was not loaded: the columns it refers to differ in {len(other_base)} of {len(layers)} layers "
            f"({_first_few(other_base)}). Load it onto the model it was trained on. {left}"
        )
    if other_precision:
        warnings.warn(
            f"The adapter was trained on another precision or quantization of this base model "
            f"({len(other_precision)} of {len(layers)} layers differ by rounding). It is loaded; its outputs will "
            "differ a little.",
            stacklevel=2,
        )
    for layer, found in read.items():
        layer.just_read[adapter_name] = found


def has_no_numbers(layers: Mapping[str, CurloraLayer], adapter_name: str) -> bool:
    """Whether an adapter was made to be loaded into, and is nothing without (PEFT's ``low_cpu_mem_usage``)."""
    return any(layer.curlora_U[adapter_name].device.type == "meta" for layer in layers.values())


def follow(layer: CurloraLayer, adapters: Sequence[str]) -> None:
    """Let a layer's factors follow the indices and the base weight now present.

    Args:
        layer: the layer.
        adapters: those whose saved buffers, or whose base weight, may be others now. What was done to the weight past
            ``load_state_dict`` is noticed for these alone.

    Raises:
        ValueError: if one of them was made on another base. All have been followed then, and this one is refused again
            whenever the layer looks at it.
        RuntimeError: if the indices of one are others now while an adapter is merged into the weight.
    """
    if not adapters or device_of(layer.get_base_layer()).type == "meta":
        return
    if layer.merged:
        moved = [adapter for adapter in adapters if not layer.took_at(adapter, layer.curlora_indices[adapter])]
        if moved:
            raise RuntimeError(
                f"layer {layer.name!r}: other indices were loaded into adapter {moved[0]!r} while "
                f"{layer.merged_adapters} is merged into the weight that they point into. Unmerge, then load again."
            )
        return
    refused = []
    for adapter in adapters:
        indices, saved = layer.curlora_indices[adapter], layer.curlora_fingerprint[adapter]
        if saved.device.type == "meta" or indices.device.type == "meta":
            continue
        found = layer.just_read.pop(adapter, None)
        if found is not None and torch.equal(found[0].to(indices.device), indices):
            layer.keep(adapter, *found[1:])
        else:
            layer.rebuild(adapter)
        if compare(saved, layer.curlora_fingerprint[adapter]) == "other":
            layer.refuse(adapter, saved)
            refused.append(adapter)
    if refused:
        raise ValueError(
            f"layer {layer.name!r}: the loaded adapter {refused[0]!r} was made on another base model, or on "
            "this one before its weights changed or were rounded. Load it onto the model it was trained on."
        )


def _find_problem(layer: CurloraLayer, r: int, U: Tensor, indices: Tensor, saved: Tensor) -> str | None:
    if U.shape != (r, r):
        return f"U has shape {tuple(U.shape)}, but the configuration says r={r}"
    if saved.shape != (LENGTH,) or saved.dtype != torch.int32:
        return "the fingerprint of the base is damaged"
    if any(t.device.type == "meta" for t in (U, indices, saved)):
        return "its tensors hold no values (they are on the meta device)"
    if not torch.isfinite(U).all():
        return "U contains NaN or infinite values"
    return problem_of_indices(indices, r, layer.weight_shape)


def _first_few(items: list[str], count: int = 3) -> str:
    rest = len(items) - count
    return "; ".join(items[:count]) + (f"; and {rest} more" if rest > 0 else "")
