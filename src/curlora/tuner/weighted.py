"""Combination of several adapters to one: arithmetic on their ``U``, and checks whether they can be combined."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from curlora.tuner.config import CurloraConfig
from curlora.tuner.layer import CurloraLayer

__all__ = ["check_combinable", "check_same_indices", "combination", "combined_config", "side_by_side"]

# PEFT applies these functions to the two factors of LoRA adapters. Here they are applied to the U of adapters with the
# same columns and rows.
_ON_SHARED_INDICES: dict[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


def combination(name: str, density: float | None, majority_sign_method: str) -> Callable[..., Tensor] | None:
    """Return the function that combines a list of ``U`` and a tensor of weights to one ``U``; ``None`` for ``"cat"``.

    Args:
        name: one of ``"cat"``, ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``.
        density: fraction of the entries of ``U`` to keep, in [0, 1]; required for the last four.
        majority_sign_method: ``"total"`` or ``"frequency"``, for ``"ties"`` and ``"dare_ties"``.

    Raises:
        ValueError: if there is no such combination, or ``density`` is missing.
    """
    if name == "cat":
        return None
    if name not in _ON_SHARED_INDICES:
        raise ValueError(
            f"Invalid combination_type: {name}. CURLoRA adapters can be combined by 'cat', always exact, or by "
            f"{', '.join(map(repr, _ON_SHARED_INDICES))} if they have the same columns and rows. Decompositions are "
            "not available: their factors would not be columns and rows of the base weight."
        )
    options: dict[str, Any] = {}
    if name != "linear":
        if density is None:
            raise ValueError(
                f"combination_type={name!r} needs density, the fraction of entries of U to keep, between 0 and 1"
            )
        options["density"] = density
    if name in ("ties", "dare_ties"):
        options["majority_sign_method"] = majority_sign_method
    return functools.partial(_ON_SHARED_INDICES[name], **options)


def side_by_side(
    matrices: Sequence[Tensor], scales: Sequence[float], indices: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Concatenate updates: return ``U`` and indices of their sum, whose rank is the sum of their ranks.

    Args:
        matrices: the ``U`` of each update, shape ``(r, r)``.
        scales: the factor of each update.
        indices: the indices of each update, shape ``(2, r)``: columns, then rows.

    Returns:
        A block-diagonal ``U``, shape ``(sum of r, sum of r)``, and its indices, shape ``(2, sum of r)``.
    """
    U = torch.block_diag(*(scale * U for scale, U in zip(scales, matrices, strict=True)))
    return U, torch.cat(list(indices), dim=1)


def check_combinable(
    configs: Mapping[str, CurloraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    layers: Mapping[str, CurloraLayer],
    wrappers: Sequence[ModulesToSaveWrapper],
) -> None:
    """Raise ``ValueError`` if adapters cannot be combined by any combination type."""
    for adapter in adapters:
        if adapter not in configs:
            raise ValueError(f"Adapter {adapter} does not exist")
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}: name at least one")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"An adapter is named more than once in {list(adapters)}: give it one weight")
    if len(weights) != len(adapters):
        raise ValueError(f"There must be one weight for each adapter, got {len(weights)} for {len(adapters)}")
    if adapter_name in configs:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "Cannot add a weighted adapter while adapters are merged, please call `unmerge_adapter` first."
        )
    for option, what in (
        ("bias", "trained biases"),
        ("trainable_token_indices", "trained the embeddings of tokens"),
        ("target_parameters", "adapts parameters by themselves"),
    ):
        for adapter in adapters:
            value = getattr(configs[adapter], option)
            if value and value != "none":
                raise ValueError(
                    f"Adapter {adapter!r} {what} ({option}={value!r}), which are not in U and cannot be weighted"
                )
    shared = [w for w in wrappers if sum(adapter in w.modules_to_save for adapter in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def check_same_indices(name: str, keys: Mapping[str, bytes], combination_type: str) -> None:
    """Raise ``ValueError`` if adapters have different columns and rows in a layer.

    Args:
        name: the layer's name.
        keys: ``Basis.key`` of each adapter, by the adapter's name.
        combination_type: the type of the combination, for the error message.
    """
    first = next(iter(keys))
    other = next((adapter for adapter in keys if keys[adapter] != keys[first]), None)
    if other is not None:
        raise ValueError(
            f"combination_type={combination_type!r} needs adapters that have the same columns and rows, but "
            f"{first!r} and {other!r} differ in layer {name!r}. Use combination_type='cat', which is exact for any "
            "adapters. Its rank is the sum of their ranks."
        )


def combined_config(configs: Sequence[CurloraConfig], ranks: Mapping[str, int]) -> CurloraConfig:
    """Return the configuration of the combined adapter, with the layers and ranks that loading needs."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    saved = list(dict.fromkeys(module for config in configs for module in config.modules_to_save or []))
    return replace(
        configs[0],
        r=r,
        alpha=1.0,  # the weights and alphas are in U
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={},
        init_weights=True,
        target_modules=set(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved or None,
    )
