"""Estimate of the memory that training needs, by the formulas of docs/complexity.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curlora._compat import attention_implementation, in_out_features
from curlora.continual.checks import Adapted
from curlora.continual.encoding import Encoded
from curlora.continual.methods import Method
from curlora.continual.processes import process_state
from curlora.continual.tasks import Row
from curlora.text.rows import IGNORED
from curlora.tuner.layer import CurloraLayer

__all__ = ["Memory", "UnknownError", "estimate", "kept_for_backward"]

_FLOAT32 = 4
# Activation functions written in Python keep more than their input for the backward pass.
_KEPT_BY_ACTIVATION = {"gelu_new": 4, "gelu_pytorch_tanh_python": 4, "gelu_fast": 6, "quick_gelu": 2}


class UnknownError(Exception):
    """There is no formula for a part of a model; the message names the part."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training in one process.

    Args:
        weights: frozen weights and buffers, CURLoRA's columns, and a method's copy of the base model.
        trained: trainable parameters, their gradients, and AdamW's two moments.
        kept: activations that the forward pass keeps for the backward pass, without the logits.
        logits: the output layer's logits and the loss's copies of them.
        unknown: why a part is ``None``, which means that there is no formula for it.
    """

    weights: int | None = None
    trained: int | None = None
    kept: int | None = None
    logits: int | None = None
    unknown: str = ""

    @property
    def total(self) -> int | None:
        """The sum of the parts; ``None`` if one of them is unknown."""
        parts = [part for part in (self.weights, self.trained, self.kept, self.logits) if part is not None]
        return sum(parts) if len(parts) == 4 else None


def estimate(
    method: Method, adapted: Adapted, base: Any, quantization: Any, heads: int, part: Encoded, rows: Sequence[Row]
) -> Memory:
    """Estimate the memory of a task's largest step: one process's share of a batch of the longest rows.

    Args:
        method, adapted: the method, and the model with the method applied.
        base: the model without the method, also on the meta device.
        quantization: the base model's quantization configuration; ``None`` if it is not quantized.
        heads: the number of classes of all tasks together.
        part, rows: the task, and the rows that are trained on.
    """
    config, trainer, classes = base.config.get_text_config(), part.settings.trainer, part.task.classes or 0
    batch = min(part.settings.batch_size // process_state().num_processes, len(rows))
    length = max(len(row["input_ids"]) for row in rows)
    if classes:
        logits = batch * classes * _FLOAT32
    else:
        answers = [[i for i, label in enumerate(row["labels"]) if label != IGNORED] for row in part.train]
        given = (length - min(map(min, answers))) * _computed(base, trainer)
        logits = batch * config.vocab_size * (given + max(map(len, answers)) * 2 * _FLOAT32)
    if adapted.model is None:
        return Memory(logits=logits, unknown=adapted.unknown)
    trained = 4 * _bytes(p for p in adapted.model.parameters() if p.requires_grad)
    trained += _FLOAT32 * (config.hidden_size + 1) * (heads + 3 * classes)
    weights = None
    try:
        weights = _weights(method, adapted.model, base, quantization)
        kept = kept_for_backward(adapted.model, base, batch, length, trainer, process_state().device.type)
    except UnknownError as error:
        return Memory(weights, trained, None, logits, f"there is no formula for {error}")
    return Memory(weights, trained, kept, logits)


def kept_for_backward(
    model: nn.Module, base: Any, batch: int, length: int, trainer: Mapping[str, Any], device: str
) -> int:
    """Estimate the bytes of activations kept for the backward pass, from the first trained block to the last norm.

    Args:
        model: the model that is trained. Only the shapes of ``model`` and ``base`` are used.
        base: the model without adapters.
        batch, length: rows and tokens per row of the step.
        trainer: the arguments of transformers' Trainer.
        device: the type of device that the model runs on.

    Raises:
        UnknownError: if there is no formula for the model or the adapter.
    """
    config, blocks, plain = base.config.get_text_config(), _blocks(model), _blocks(base)
    trains = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    if not any(trains):
        return 0
    if len({str([p.shape for p in block.parameters()]) for block in plain}) > 1:
        raise UnknownError("blocks that differ")
    if any(p.ndim > 2 for p in plain.parameters()) or not hasattr(config, "num_attention_heads"):
        raise UnknownError("blocks with other parts than attention and a dense MLP")
    width, heads, size = config.hidden_size, config.num_attention_heads, _computed(base, trainer)
    across = heads * (getattr(config, "head_dim", None) or width // heads)
    autocast = _autocast(trainer)

    norms: list[Any] = [m for m in plain[0].modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]
    rms = any("RMS" in type(norm).__name__ for norm in norms)
    residual = _FLOAT32 if rms or autocast else size
    normed = sum(width if norm.weight.numel() == width else across for norm in norms)
    block = normed * residual
    if rms and all(norm.weight.requires_grad for norm in blocks[-1].modules() if type(norm) is type(norms[0])):
        block += normed * (_FLOAT32 if autocast else size)

    dropout = any(getattr(config, name, 0) for name in ("attn_pdrop", "attention_dropout"))
    if attention_implementation(config) == "eager" or (dropout and device == "cpu"):  # the CPU has no fused kernel
        block += (4 * across + heads * length * (3 if dropout else 1)) * _FLOAT32
    else:
        block += (4 * across + length) * size + heads * _FLOAT32

    sides = [in_out_features(m) for m in plain[0].modules() if isinstance(m, (nn.Linear, Conv1D))]
    inner = sides[-1][0]  # the inputs of the MLP's last layer, which maps back to the width
    gated = sum(m for n, m in sides[-3:-1] if n == width != m) >= 2 * inner
    activation = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", ""))
    block += (_KEPT_BY_ACTIVATION.get(activation, 1) + 2 * gated) * inner * size

    count, tokens = len(blocks) - trains.index(True), batch * length
    kept, copies = count * block + _of_trained_layers(blocks, size, autocast, device), count
    if trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing"):  # one block is kept at a time
        kept, copies = kept // count + count * width * residual, 1
    return tokens * (kept + width * residual) + 2 * autocast * copies * sum(n * m for n, m in sides)


def _of_trained_layers(blocks: nn.ModuleList, size: int, autocast: bool, device: str) -> int:
    """Return the bytes per token that layers with trainable weights keep for the backward pass."""
    inputs: dict[tuple[str, int], int] = {}  # layers of one module with inputs of the same width share them
    total = 0
    for name, layer in blocks.named_modules():
        module = name if autocast else name.rpartition(".")[0]  # under autocast each layer has its own copy
        if isinstance(layer, CurloraLayer):
            total += sum(U.r * U.weight.element_size() for U in layer.matrices.values() if U.weight.requires_grad)
        elif isinstance(layer, LoraLayer) and not layer.lora_variant:
            for adapter, A in layer.lora_A.items():
                each = 2 if autocast else A.weight.element_size()
                if A.weight.requires_grad:
                    dropout = isinstance(layer.lora_dropout[adapter], nn.Dropout)
                    mask = A.weight.element_size() if device == "cpu" else 1  # floats on a CPU, else booleans
                    total += layer.r[adapter] * each + dropout * layer.in_features * mask
                    inputs[name if dropout or each != size else module, layer.in_features] = each
        elif isinstance(layer, BaseTunerLayer):
            kind = type(layer).__module__.rpartition(".")[0].rpartition(".")[2]
            kind += ", such as DoRA," if isinstance(layer, LoraLayer) else ""
            raise UnknownError(f"what an adapter of {kind} keeps for the backward pass")
        elif isinstance(layer, (nn.Linear, Conv1D)) and layer.weight.requires_grad and "lora_" not in name:
            inputs[module, in_out_features(layer)[0]] = size
    return total + sum(n * each for (_, n), each in inputs.items())


def _weights(method: Method, model: nn.Module, base: Any, quantization: Any) -> int:
    copies = [base]

    def load() -> nn.Module:
        copies.append(base)
        return base

    if method.trains_backbone:
        method.base_logits(model, load)  # some methods load a second copy of the base model for it
    total = _bytes(p for p in model.parameters() if not p.requires_grad) + _bytes(model.buffers())
    total += (len(copies) - 1) * (_bytes(base.parameters()) + _bytes(base.buffers()))
    for layer in model.modules():
        if isinstance(layer, CurloraLayer):  # the columns of a layer, or the columns and rows of a parameter
            sides = layer.weight_shape if layer.parameter_name else [in_out_features(layer.get_base_layer())[1]]
            total += sum(sum(sides) * U.r * U.weight.element_size() for U in layer.matrices.values())
    if quantization is None:
        return total
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = given.get("bits") or given.get("nbits") or 4 * bool(given.get("load_in_4bit"))
    if not bits and not given.get("load_in_8bit"):
        raise UnknownError(f"the size of weights that {given.get('quant_method')} has quantized")
    # A group of weights has a scale and a zero point of 2 bytes each, or a scale of 4 bytes.
    each = bits / 8 + 4 / (given.get("group_size") or 64) if bits else 1.0
    linear = [m.weight for m in _blocks(base).modules() if isinstance(m, (nn.Linear, Conv1D))]
    return total + len(copies) * (int(each * sum(weight.numel() for weight in linear)) - _bytes(linear))


def _autocast(trainer: Mapping[str, Any]) -> bool:
    return bool(trainer.get("bf16") or trainer.get("fp16"))


def _computed(base: nn.Module, trainer: Mapping[str, Any]) -> int:
    """Return the bytes of an element of the activations."""
    return 2 if _autocast(trainer) else next(base.parameters()).element_size()


def _blocks(model: Any) -> nn.ModuleList:
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UnknownError("a model without a list of blocks")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
