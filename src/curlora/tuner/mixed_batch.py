"""Inference with a different adapter for each row of a batch: ``model(..., adapter_names=[...])``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from curlora.functional import gather_update_by_row
from curlora.tuner.basis import Basis

__all__ = ["adapter_names_passed", "check_adapter_names", "update_rows"]

BASE = "__base__"  # PEFT's name for a row without an adapter


def check_adapter_names(x: Tensor, adapter_names: Sequence[str], merged: bool) -> None:
    """Raise ``ValueError``, as PEFT's LoRA does, if a layer cannot use a different adapter for each row of ``x``."""
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def update_rows(
    output: Tensor,
    adapter_names: Sequence[str],
    bases: Mapping[str, Basis],
    scaled_U: Mapping[str, Tensor],
    offsets: Mapping[int, Tensor | None],
) -> Tensor:
    """Add to each row of a base layer's output the update of that row's adapter.

    Adapters that share a basis form one group. A group takes one gather and two products for all its rows, whatever the
    number of its adapters. Groups with different bases are computed one after another.

    Args:
        output: output of the base layer, shape ``(rows, ..., out_features)``.
        adapter_names: one per row. ``"__base__"`` and adapters that are not in ``bases`` leave the row unchanged.
        bases: the basis of each adapter, by the adapter's name, on the device of ``output``.
        scaled_U: the scaled ``U`` of each adapter, by the adapter's name, shape ``(r, r)``.
        offsets: the base layer's bias at the gathered outputs, shape ``(r,)``, by the ``id`` of the basis.

    Returns:
        A new tensor of ``output``'s shape and dtype, or ``output`` itself if no row changes.
    """
    groups: dict[int, list[int]] = {}
    for row, name in enumerate(adapter_names):
        if name in bases:
            groups.setdefault(id(bases[name]), []).append(row)
    result = output
    for rows in groups.values():
        names = [adapter_names[row] for row in rows]
        basis = bases[names[0]]
        distinct = {name: i for i, name in enumerate(dict.fromkeys(names))}
        which = torch.tensor([distinct[name] for name in names], device=output.device)
        by_row = torch.stack([scaled_U[name] for name in distinct]).index_select(0, which)
        index = torch.tensor(rows, device=output.device)
        some = output if len(rows) == len(adapter_names) else output.index_select(0, index)
        changed = gather_update_by_row(some, by_row, basis.factor, basis.gathered, offsets[id(basis)])
        result = changed if some is output else result.index_copy(0, index, changed)
    return result


@contextmanager
def adapter_names_passed(
    model: nn.Module,
    adapter_names: Sequence[str],
    present: set[str],
    layer_class: type[BaseTunerLayer],
    num_beams: int | None,
) -> Iterator[None]:
    """Pass ``adapter_names`` to every adapted layer and every module that is saved whole, inside this context.

    Args:
        model: the model with the adapters.
        adapter_names: one per row of the batch.
        present: names of the model's adapters.
        layer_class: class of the adapted layers.
        num_beams: number of beams in generation. A beam search repeats each row so often, but not in an encoder.

    Raises:
        ValueError: if the model is in training mode, or has no such adapter.
        TypeError: if the names are not a list or tuple.
    """
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
            if isinstance(module, (layer_class, AuxiliaryTrainingWrapper)):
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
