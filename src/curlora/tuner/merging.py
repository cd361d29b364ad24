"""Merging into a quantized layer: by PEFT's own code for LoRA, which knows the libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

__all__ = ["merged_copy"]


@torch.no_grad()
def merged_copy(
    layer: nn.Module,
    factors: tuple[Tensor, Tensor],
    *,
    safe_merge: bool,
    name: str,
    get_apply_tensor_subclass: Callable[[], Any] | None = None,
) -> nn.Module:
    """A quantized layer with an update added to its weight, quantized anew.

    Args:
        layer: the quantized layer; left as it is.
        factors: of the update, shapes ``(m, r)`` and ``(r, n)``.
        safe_merge: refuse if the merged weight would not be finite.
        name: the layer's, for errors.
        get_apply_tensor_subclass: of torchao's configuration: how the weight is to be quantized.

    Raises:
        ValueError: if PEFT cannot merge LoRA into such a layer either, or the result would not be finite.
    """
    left, right = factors
    rank = len(right)
    torchao = {} if get_apply_tensor_subclass is None else {"get_apply_tensor_subclass": get_apply_tensor_subclass}
    try:
        lora = LoraModel._create_new_module(
            LoraConfig(r=rank, lora_alpha=rank), "merged", _twin(layer), r=rank, lora_alpha=rank,
            loaded_in_8bit=True, loaded_in_4bit=True, **torchao,
        )  # fmt: skip
        if type(lora) is Linear:  # which is for weights that are not quantized
            raise NotImplementedError
        lora.lora_A["merged"].weight.data = right
        lora.lora_B["merged"].weight.data = left
        lora.merge(safe_merge=safe_merge)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__}, into whose quantized weight PEFT can merge nothing. Merge "
            "into the model in float32, bfloat16 or float16, or serve the adapter unmerged, as it is or as LoRA "
            "(curlora.save_as_lora)."
        ) from error
    return lora.get_base_layer()


def _twin(layer: nn.Module) -> Any:
    """The same weight in a layer of its own, into which another may be put."""
    twin: Any = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    if hasattr(layer, "state"):  # of bitsandbytes: the scales of an 8-bit weight
        twin.state = copy.copy(layer.state)
    return twin
