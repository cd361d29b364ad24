"""The plan of a training: its steps, learning rate and memory, computed without the base model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curlora._compat import in_out_features
from curlora.budget.examples import COUNT
from curlora.budget.guard_restraint import allowed_nats
from curlora.budget.learning_rate import lora_learning_rate_of
from curlora.budget.work import work_of
from curlora.continual.memory import UnknownError, kept_for_backward
from curlora.continual.processes import use_cpu
from curlora.guard import GuardError, learning_rate
from curlora.text.rows import rows_of
from curlora.train.data import Examples, Split
from curlora.train.errors import TrainError
from curlora.train.model import Base
from curlora.train.options import TrainOptions
from curlora.tuner.layer import CurloraLayer

__all__ = ["Memory", "TrainPlan", "guard_row", "make_plan", "with_checkpointing"]

_FLOAT32 = 4
# TRL computes the loss on pieces of the logits, of at most so many tokens and vocabulary entries. On a GPU it works in
# place. On the CPU the torch operations make copies of a piece.
_PIECE = (4096, 32768)
_COPIES = {"cpu": 8, "cuda": 1}
_GUARD_COPIES = 4  # of the guard's logits: the logits, their gradient, and the intermediate results of the softmax
_BITS = {"4bit": 4.5, "8bit": 8.0}  # bits per weight, with the scales of its blocks


@dataclass(frozen=True)
class Memory:
    """Peak memory, in bytes.

    Args:
        weights: the frozen weights, and the columns that CURLoRA holds.
        trained: the trainable parameters, their gradients, and AdamW's two moments.
        kept: activations that the forward pass of a step keeps for the backward pass. ``None``: there is no formula for
            the model.
        logits: the piece of the logits that TRL computes at a time, with the intermediate results of the loss.
        guard: what a pass of the guard before training, or of the penalty in a step, needs in addition to the weights.
            ``None`` as for ``kept``.
    """

    weights: int
    trained: int
    kept: int | None
    logits: int
    guard: int | None

    @property
    def total(self) -> int | None:
        """The peak of a training step or of the guard's pass, whichever is larger; ``None`` if a part is unknown."""
        if self.kept is None or self.guard is None:
            return None
        return self.weights + max(self.trained + self.kept + self.logits, self.guard)


@dataclass(frozen=True)
class TrainPlan:
    """What a training will do and need.

    Args:
        steps: number of optimizer steps.
        logging_steps, save_steps: steps from one log entry, or one checkpoint, to the next.
        tokens: tokens processed over all epochs, prompts included.
        parameters: number of parameters of the base model.
        trained: number of trainable parameters.
        layers: number of layers with an adapter.
        rank: the highest rank of these layers.
        learning_rate: the learning rate by the rule for the adapter, approximately; ``None`` without a rule.
        guard_work: the guard's work before training and after it, in tokens of a forward pass.
        memory: peak memory, estimated for the largest step.
    """

    steps: int
    logging_steps: int
    save_steps: int
    tokens: int
    parameters: int
    trained: int
    layers: int
    rank: int
    learning_rate: float | None
    guard_work: tuple[float, float]
    memory: Memory


def make_plan(options: TrainOptions, base: Base, examples: Examples) -> TrainPlan:
    """Attach the adapter to the model on the meta device, and compute the plan.

    Raises:
        TrainError: if the adapter does not fit the model, or if a guard text has no token to predict.
    """
    sizes = _guard_tokens(options, base)
    nats = allowed_nats(sizes, options.limits, options.max_forgetting)
    looked_at = min(COUNT, len(examples.train.rows)) * examples.train.tokens // len(examples.train.rows)
    plain, model = base.empty()
    rows = len(examples.train.rows)
    batches = math.ceil(rows / options.batch_size)
    steps = math.ceil(batches / options.gradient_accumulation) * options.epochs
    logging = max(1, steps // 100)
    adapted = [layer for layer in model.modules() if isinstance(layer, (CurloraLayer, LoraLayer))]
    rank = max(r for layer in adapted for r in layer.r.values())
    rate = learning_rate(nats, steps, rank) if base.guarded else lora_learning_rate_of(model, model.active_adapter)
    return TrainPlan(
        steps=steps,
        logging_steps=logging,
        # An interruption loses at most about a tenth of the training. Checkpoints fall on logging steps, because a
        # logged loss is the mean since the last entry: resuming between two entries would change it.
        save_steps=logging * max(1, steps // 10 // logging),
        tokens=examples.train.tokens * options.epochs,
        parameters=sum(p.numel() for p in plain.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=len(adapted),
        rank=rank,
        learning_rate=rate,
        guard_work=work_of(
            sum(sizes.values()),
            looked_at,
            written=not options.guard_texts,
            guarded=base.guarded,
            trained_before=base.continue_from is not None or not base.guarded,
        ),
        memory=_memory(options, base, plain, model, examples.train),
    )


def guard_row(base: Base) -> int:
    """Return the length of a row of the guard texts, in tokens."""
    return min(TrainOptions.GUARD_ROW, base.positions or TrainOptions.GUARD_ROW)


def _guard_tokens(options: TrainOptions, base: Base) -> dict[str, int]:
    if not options.guard_texts:
        return {"": options.GUARD_TOKENS}
    how: dict[str, Any] = dict(tokens=options.GUARD_TOKENS, max_length=guard_row(base))
    sizes = {}
    for name, path in options.guard_texts.items():
        try:
            sizes[name] = sum(map(len, rows_of(name, path, base.tokenizer, **how)))
        except GuardError as error:
            raise TrainError(f"--guard-text {path}: {error}") from error
    return sizes


def with_checkpointing(options: TrainOptions) -> bool:
    """Return whether to use gradient checkpointing; on an accelerator it is the default."""
    return not use_cpu() if options.gradient_checkpointing is None else options.gradient_checkpointing


def _memory(options: TrainOptions, base: Base, plain: Any, model: Any, train: Split) -> Memory:
    batch, device = min(options.batch_size, len(train.rows)), "cpu" if use_cpu() else "cuda"
    weights = _bytes(p for p in model.parameters() if not p.requires_grad) + _bytes(model.buffers())
    for layer in model.modules():
        if isinstance(layer, CurloraLayer):
            side = in_out_features(layer.get_base_layer())[1]
            weights += sum(side * U.r * U.weight.element_size() for U in layer.matrices.values())
    if base.quantize:
        head = plain.get_output_embeddings()
        linear = [m.weight for m in plain.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        weights += int(sum(w.numel() for w in linear) * _BITS[base.quantize] / 8) - _bytes(linear)
    kept: int | None
    guard: int | None
    arguments = {"bf16": base.bf16, "gradient_checkpointing": with_checkpointing(options)}
    words = base.config.get_text_config().vocab_size
    logits = min(batch * train.longest, _PIECE[0]) * min(words, _PIECE[1]) * _FLOAT32 * _COPIES[device]
    # A batch of the guard is counted as one row, which is the most that it can need.
    rows, length = (1, max(options.GUARD_BATCH * options.GUARD_ROW, train.longest)) if base.guarded else (
        options.PENALTY_ROWS, options.GUARD_ROW
    )  # fmt: skip
    try:
        kept = kept_for_backward(model, plain, batch, train.longest, arguments, device)
        guard = kept_for_backward(model, plain, rows, length, {"bf16": base.bf16}, device)
    except UnknownError:
        kept = guard = None
    if guard is not None:
        size = 2 if base.bf16 else _FLOAT32
        # The guard keeps the outputs of all adapted layers until it has their gradients.
        outputs = sum(in_out_features(m.get_base_layer())[1] for m in model.modules() if isinstance(m, CurloraLayer))
        guard += rows * length * (outputs * size + words * _FLOAT32 * _GUARD_COPIES)
    trained = 4 * _bytes(p for p in model.parameters() if p.requires_grad)
    if guard is not None and not base.guarded:
        guard += trained  # the penalty runs in a step, beside the optimizer's state
    return Memory(weights, trained, kept, logits, guard)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
