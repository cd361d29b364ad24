"""Batches at inference whose rows each take an adapter of their own: ``model(..., adapter_names=[...])``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from curlora.functional import gather_update_by_row

if TYPE_CHECKING:
    from curlora.tuner.layer import CurloraLayer

BASE = "__base__"  # PEFT's name for a row that takes no adapter


def check_adapter_names(layer: CurloraLayer, x: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise ``ValueError``, as PEFT's LoRA does, if a layer cannot give each row of ``x`` its adapter."""
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def update_rows(layer: CurloraLayer, output: Tensor, adapter_names: Sequence[str]) -> Tensor:
    """Add to each row of a base layer's output the update of its own adapter.

    Adapters that were drawn alike are one group: a gather and two products for all of its rows, however many adapters
    there are. Rows of other draws, and so of other ranks, come one group after another.

    Args:
        layer: the adapted layer.
        output: of its base layer, shape ``(rows, ..., out_features)``.
        adapter_names: one per row. ``"__base__"``, and an adapter that this layer does not have, leave the row alone.

    Returns:
        A new tensor of ``output``'s shape and dtype, or ``output`` if no row changes.
    """
    groups: dict[bytes, dict[int, str]] = {}
    for row, name in enumerate(adapter_names):
        if name != BASE and name in layer.draws:
            groups.setdefault(layer.draws[name], {})[row] = name

    result = output
    for group in groups.values():
        if len(group) == len(adapter_names):
            return _update_group(layer, output, list(group.values()))
        rows = torch.tensor(list(group), device=output.device)
        changed = _update_group(layer, output.index_select(0, rows), list(group.values()))
        result = result.index_copy(0, rows, changed) if result is output else result.index_copy_(0, rows, changed)
    return result


def _update_group(layer: CurloraLayer, output: Tensor, names: Sequence[str]) -> Tensor:
    """``output`` with the update of adapters that have the same indices, one name per row."""
    adapters = list(dict.fromkeys(names))
    if len(adapters) == 1:
        return layer.update(output, adapters)
    index, factor = layer.sides(adapters[0])
    position = {name: i for i, name in enumerate(adapters)}
    which = torch.tensor([position[name] for name in names], device=output.device)
    mixing = torch.stack([layer.mixing(name) for name in adapters]).index_select(0, which)
    return gather_update_by_row(output, mixing, factor, index, layer.offset(index))


@contextmanager
def adapter_names_passed(
    model: nn.Module, adapter_names: Sequence[str], present: set[str], num_beams: int | None
) -> Iterator[None]:
    """Hand ``adapter_names`` to every adapted layer, and every module saved whole, inside this context.

    Args:
        model: with the adapters.
        adapter_names: one per row of the batch.
        present: the adapters that there are.
        num_beams: of a beam search, which repeats each row that often, but for an encoder.

    Raises:
        ValueError: if the model is being trained, or has no such adapter.
        TypeError: if the names are no list.
    """
    from curlora.tuner.layer import CurloraLayer

    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(adapter_names) - present - {BASE}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

    repeated = adapter_names
    if isinstance(num_beams, int) and num_beams > 1:
        repeated = [name for name in adapter_names for _ in range(num_beams)]
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    in_encoder = set(encoder.modules()) if encoder is not None and encoder is not model else set()
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, (CurloraLayer, AuxiliaryTrainingWrapper)):
                names = adapter_names if module in in_encoder else repeated
                handles.append(module.register_forward_pre_hook(partial(_pass, adapter_names=names), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
