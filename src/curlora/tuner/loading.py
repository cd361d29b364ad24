"""Check of an adapter's state dict against the model, before anything is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from curlora.tuner.basis import problem_of_indices
from curlora.tuner.fingerprint import LENGTH, compare_layers
from curlora.tuner.format import ENTRIES
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.weight import is_readable

__all__ = ["check"]

_OURS = re.compile(r"\.curlora_U\.")


def check(
    layers: Mapping[str, CurloraLayer], adapter_name: str, state_dict: Mapping[str, Tensor], afterwards: str
) -> None:
    """Refuse a state dict that does not fit the model, and warn about another precision of the base model.

    Args:
        layers: the layers that hold the adapter, by name.
        adapter_name: the adapter's name.
        state_dict: the tensors that are about to be loaded. Their names contain the adapter's name.
        afterwards: a sentence about the state of the model after a refusal, for the error message.

    Raises:
        ValueError: if the state dict does not fit. The message names the layers and what is wrong with them.
    """
    # FSDP adds a prefix to the names of modules, which the names in a state dict do not have.
    layers = {name.removeprefix("_fsdp_wrapped_module."): layer for name, layer in layers.items()}
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be loaded while adapters are merged into the weights that it refers to "
            f"({_first_few(merged)}). Unmerge first. {afterwards}"
        )
    problems: list[str] = []
    fingerprints: dict[str, tuple[Tensor, Tensor]] = {}
    expected = set()
    for name, layer in layers.items():
        keys = [f"{name}.curlora_U.{adapter_name}.{entry}" for entry in ENTRIES]
        expected.update(keys)
        missing = [key for key in keys if key not in state_dict]
        if missing:
            problems.append(f"{missing[0]} is missing")
            continue
        U, indices, saved = (state_dict[key] for key in keys)
        problem = _find_problem(layer, layer.matrices[adapter_name].weight.shape, U, indices, saved)
        if problem:
            problems.append(f"{name}: {problem}")
        elif is_readable(layer.get_base_layer(), layer.parameter_name):
            fingerprints[name] = saved, layer.read_basis(indices).fingerprint
    problems += [
        f"{key} belongs to no adapted layer" for key in state_dict if _OURS.search(key) and key not in expected
    ]
    if problems:
        raise ValueError(
            f"The adapter does not fit this model and was not loaded: {_first_few(problems)}. {afterwards}"
        )
    verdicts = compare_layers(fingerprints)
    other_base, other_precision = (
        [name for name, verdict in verdicts.items() if verdict == kind] for kind in ("other", "precision")
    )
    if other_base:
        raise ValueError(
            "The adapter was made on another base model, or on this one before its weights changed or were rounded, "
            f"and was not loaded: the columns it refers to differ in {len(other_base)} of {len(layers)} layers "
            f"({_first_few(other_base)}). Load it onto the model it was trained on. {afterwards}"
        )
    if other_precision:
        warnings.warn(
            f"The adapter was trained on another precision or quantization of this base model "
            f"({len(other_precision)} of {len(layers)} layers differ by rounding). It is loaded; its outputs will "
            "differ a little.",
            stacklevel=2,
        )


def _find_problem(layer: CurloraLayer, shape: torch.Size, U: Tensor, indices: Tensor, saved: Tensor) -> str | None:
    if U.shape != shape:
        return f"U has shape {tuple(U.shape)}, but the configuration says {tuple(shape)}"
    if saved.shape != (LENGTH,) or saved.dtype != torch.int32:
        return "the fingerprint of the base is damaged"
    if any(t.is_meta for t in (U, indices, saved)):
        return "its tensors hold no values (they are on the meta device)"
    if not torch.isfinite(U).all():
        return "U contains NaN or infinite values"
    return problem_of_indices(indices, shape[-1], layer.weight_shape)


def _first_few(items: list[str], count: int = 3) -> str:
    rest = len(items) - count
    return "; ".join(items[:count]) + (f"; and {rest} more" if rest > 0 else "")
