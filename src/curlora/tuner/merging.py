"""Merging adapters into a layer's weight and taking them out again; quantized ones by PEFT's code for LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import check_deepspeed_zero3_enabled
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curlora.functional import autocast_off
from curlora.tuner.sharded import laid_out_like, whole
from curlora.tuner.weight import device_of, is_plain, unpacked

if TYPE_CHECKING:
    from curlora.tuner.layer import CurloraLayer

__all__ = ["merge", "unmerge"]


def merge(layer: CurloraLayer, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """See :meth:`curlora.CurloraLayer.merge`. On an error the layer is as it was."""
    adding = [a for a in check_adapters_to_merge(layer, adapter_names) if a in layer.curlora_U]
    if not adding:
        return
    if check_deepspeed_zero3_enabled():
        raise RuntimeError(
            f"layer {layer.name!r}: the weights are partitioned by ZeRO-3, so that nothing can be merged into them. "
            "Save the adapter, and merge it into the model in one process."
        )
    # C and R belong to the base weight: compute every update before any is added.
    together = [*layer.merged_adapters, *adding]
    if is_plain(layer.get_base_layer()):
        _merge_plain(layer, together, safe_merge)
    else:
        _merge_quantized(layer, together, safe_merge)


def unmerge(layer: CurloraLayer) -> None:
    """See :meth:`curlora.CurloraLayer.unmerge`."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    merged: Any = layer.get_base_layer()
    if layer.unmerged_base:
        base = layer.unmerged_base.pop()
        if device_of(base) != device_of(merged):  # moved since
            base.to(device_of(merged))
        layer.base_layer = base
    else:
        # Subtracting would leave rounding behind, in half precision enough to make this another base.
        weight, before = merged.weight.data, layer.unmerged_weight
        if isinstance(before, DTensor) and not isinstance(weight, DTensor):  # FSDP2 gathers weights for a forward pass
            before = whole(before)
        assert before is not None
        weight.copy_(laid_out_like(before, weight))
        layer.unmerged_weight = None
    layer.merged_adapters = []
    layer.merged_factors = {}


def _merge_plain(layer: CurloraLayer, adapters: list[str], safe_merge: bool) -> None:
    base: Any = layer.get_base_layer()
    before = layer.unmerged_weight, layer.merged_factors, layer.merged_adapters
    weight_before = base.weight.data.clone() if safe_merge else None
    if layer.merged:
        unmerge(layer)
    factors = {adapter: layer.delta_factors(adapter) for adapter in adapters}
    merged = base.weight.data
    # Out of the accelerator's memory, which merging is often meant to save.
    unmerged = merged.clone() if isinstance(merged, DTensor) else merged.to("cpu", copy=True)
    for adapter, (left, right) in factors.items():
        with autocast_off(left):
            delta = left @ right
        merged += laid_out_like(delta.to(merged.dtype), merged)
        if safe_merge and not torch.isfinite(merged).all():
            base.weight.data = weight_before
            layer.unmerged_weight, layer.merged_factors, layer.merged_adapters = before
            raise _not_finite(layer, adapter)
    layer.unmerged_weight, layer.merged_factors, layer.merged_adapters = unmerged, factors, adapters


def _merge_quantized(layer: CurloraLayer, adapters: list[str], safe_merge: bool) -> None:
    before = layer.base_layer, list(layer.unmerged_base), layer.merged_factors, layer.merged_adapters
    try:
        if layer.merged:
            unmerge(layer)
        base = layer.base_layer
        factors = {adapter: layer.delta_factors(adapter) for adapter in adapters}
        for adapter, sides in factors.items():
            if safe_merge and not all(side.isfinite().all() for side in sides):
                raise _not_finite(layer, adapter)
        layer.base_layer = _merged_copy(layer, list(factors.values()), safe_merge)
    except ValueError:
        layer.base_layer, layer.unmerged_base, layer.merged_factors, layer.merged_adapters = before
        raise
    layer.unmerged_base, layer.merged_factors, layer.merged_adapters = [base], factors, adapters


def _not_finite(layer: CurloraLayer, adapter: str) -> ValueError:
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken (layer {layer.name!r})"
    )


def _merged_copy(layer: CurloraLayer, factors: Sequence[tuple[Tensor, Tensor]], safe_merge: bool) -> nn.Module:
    """The quantized base layer with updates added to its weight, quantized anew. The layer itself is left as it is.

    Raises:
        ValueError: if PEFT cannot merge LoRA into such a layer either, or the result would not be finite.
    """
    base = layer.get_base_layer()
    left, right = (torch.cat(side, dim=1 - i) for i, side in enumerate(zip(*factors, strict=True)))
    rank = len(right)
    quantize: Callable[[], Any] | None = layer.get_apply_tensor_subclass
    torchao = {} if quantize is None else {"get_apply_tensor_subclass": quantize}
    try:
        lora = LoraModel._create_new_module(
            LoraConfig(r=rank, lora_alpha=rank), "merged", _twin(base), r=rank, lora_alpha=rank,
            loaded_in_8bit=True, loaded_in_4bit=True, **torchao,
        )  # fmt: skip
        if type(lora) is Linear:  # which is for weights that are not quantized
            raise NotImplementedError
        lora.lora_A["merged"].weight.data = right
        lora.lora_B["merged"].weight.data = left
        with torch.no_grad():
            lora.merge(safe_merge=safe_merge)
    except ValueError as error:
        raise ValueError(f"layer {layer.name!r}: {error}") from error
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"layer {layer.name!r} is a {type(base).__name__}, into whose quantized weight PEFT can merge nothing. "
            "Merge into the model in float32, bfloat16 or float16, or serve the adapter unmerged, as it is or as LoRA "
            "(curlora.save_as_lora)."
        ) from error
    return lora.get_base_layer()


def _twin(layer: nn.Module) -> Any:
    """The same weight in a layer of its own, into which another may be put."""
    twin: Any = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    if "weight" in twin._parameters:
        twin._parameters["weight"] = unpacked(layer.weight)
    if hasattr(layer, "state"):  # of bitsandbytes: the scales of an 8-bit weight
        twin.state = copy.copy(layer.state)
    return twin
