"""Several adapters of a model as one more: ``model.add_weighted_adapter(...)``."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from curlora.tuner.config import CurloraConfig
from curlora.tuner.layer import CurloraLayer

if TYPE_CHECKING:
    from curlora.tuner.model import CurloraModel

# What PEFT does to the two factors of LoRA adapters is here done to U, of adapters that have the same columns and rows.
_ON_SHARED_INDICES: dict[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


@torch.no_grad()
def add_weighted_adapter(
    model: CurloraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """See :meth:`curlora.CurloraModel.add_weighted_adapter`."""
    if len(adapters) == 1 and combination_type == "cat":
        combination_type = "linear"  # the same, and PEFT calls it so
    combine = _combination(combination_type, density, majority_sign_method)
    layers = {name: layer for name, layer in model.model.named_modules() if isinstance(layer, CurloraLayer)}
    layers = {name: layer for name, layer in layers.items() if any(adapter in layer.r for adapter in adapters)}
    wrappers = [module for module in model.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    _check(model, adapters, weights, adapter_name, layers, wrappers)
    if combine is not None:
        _check_same_indices(adapters, layers, combination_type)

    ranks = {}
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        here = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.r]
        Us = [layer.curlora_U[adapter].detach() for adapter, _ in here]
        scales = [weight * layer.alpha[adapter] for adapter, weight in here]
        indices = [layer.curlora_indices[adapter] for adapter, _ in here]
        if combine is None:
            parts[name] = (
                torch.cat(indices, dim=1),
                torch.block_diag(*(scale * U for scale, U in zip(scales, Us, strict=True))),
            )
        else:
            parts[name] = indices[0], combine(Us, torch.tensor(scales, dtype=Us[0].dtype, device=Us[0].device))
        ranks[name] = len(parts[name][1])
        most = min(layer.weight_shape)
        if ranks[name] > most:
            raise ValueError(
                f"combination_type={combination_type!r} gives layer {name!r} rank {ranks[name]}, the sum of the "
                f"adapters', above the {most} that its weight allows. Combine fewer at once."
            )

    configs = [model.peft_config[adapter] for adapter in adapters]
    model.peft_config[adapter_name] = _config(configs, ranks)
    try:
        # Draws columns and rows, which are then replaced.
        model.inject_adapter(model.model, adapter_name, autocast_adapter_dtype=False)
    except BaseException:
        del model.peft_config[adapter_name]
        raise
    for name, (index, U) in parts.items():
        layers[name].redraw(adapter_name, index)
        layers[name].curlora_U[adapter_name] = nn.Parameter(U, requires_grad=False)
    for wrapper in wrappers:
        for owner in set(adapters) & set(wrapper.modules_to_save):
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())


def _combination(name: str, density: float | None, majority_sign_method: str) -> Callable[..., Tensor] | None:
    """From ``U``s and weights to a ``U``; ``None`` for "cat", which puts them side by side."""
    if name == "cat":
        return None
    if name not in _ON_SHARED_INDICES:
        raise ValueError(
            f"Invalid combination_type: {name}. CURLoRA adapters can be combined by 'cat', always exact, or by "
            f"{', '.join(map(repr, _ON_SHARED_INDICES))} where they have the same columns and rows. There is none with "
            "a decomposition: its factors would be no columns and rows of the base weight."
        )
    options: dict[str, Any] = {}
    if name != "linear":
        if density is None:
            raise ValueError(f"combination_type={name!r} needs density, the share of numbers to keep")
        options["density"] = density
    if name in ("ties", "dare_ties"):
        options["majority_sign_method"] = majority_sign_method
    return functools.partial(_ON_SHARED_INDICES[name], **options)


def _check(
    model: CurloraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    layers: Mapping[str, CurloraLayer],
    wrappers: Sequence[ModulesToSaveWrapper],
) -> None:
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"An adapter is named more than once in {list(adapters)}: give it one weight")
    if len(weights) != len(adapters):
        raise ValueError(f"There must be one weight for each adapter, got {len(weights)} for {len(adapters)}")
    if adapter_name in model.peft_config:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "Cannot add a weighted adapter while adapters are merged, please call `unmerge_adapter` first."
        )
    trained_bias = [adapter for adapter in adapters if model.peft_config[adapter].bias != "none"]
    if trained_bias:
        raise ValueError(
            f"Adapter {trained_bias[0]!r} trained biases (bias={model.peft_config[trained_bias[0]].bias!r}), "
            "which belong to the model and cannot be weighted"
        )
    trained_tokens = [adapter for adapter in adapters if model.peft_config[adapter].trainable_token_indices]
    if trained_tokens:
        raise ValueError(
            f"Adapter {trained_tokens[0]!r} trained the embeddings of tokens (trainable_token_indices), which are "
            "not in U and cannot be weighted"
        )
    shared = [w for w in wrappers if sum(adapter in w.modules_to_save for adapter in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def _check_same_indices(adapters: Sequence[str], layers: Mapping[str, CurloraLayer], combination_type: str) -> None:
    for name, layer in layers.items():
        here = [adapter for adapter in adapters if adapter in layer.r]
        other = next((a for a in here if layer.draws[a] != layer.draws[here[0]]), None)
        if other is not None:
            raise ValueError(
                f"combination_type={combination_type!r} needs adapters that have the same columns and rows, but "
                f"{here[0]!r} and {other!r} have others in layer {name!r}. Use combination_type='cat', which is exact "
                "for any adapters; its rank is the sum of theirs."
            )


def _config(configs: Sequence[CurloraConfig], ranks: Mapping[str, int]) -> CurloraConfig:
    """The configuration under which the combined adapter is saved, and finds its layers and ranks when loaded."""
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
