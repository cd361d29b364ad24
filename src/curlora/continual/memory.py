"""What training would take of memory, found out without the base model's weights."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from curlora.continual.batches import Collator
from curlora.continual.methods import Method
from curlora.continual.processes import process_state
from curlora.continual.run import Stream
from curlora.continual.sequence import Encoded
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import IGNORED, Row
from curlora.tuner.basis import Basis
from curlora.tuner.layer import CurloraLayer
from curlora.tuner.linear import CurloraLinear

__all__ = ["Memory", "kept_for_backward", "resident", "with_largest_step"]


@dataclass(frozen=True)
class Memory:
    """Estimated peak of training in one process, in bytes; ``None`` where it cannot be told.

    Not in it: what the allocator and the backward pass take for a moment, what plug-ins keep, and with activation
    checkpointing what a block computes again.

    Args:
        frozen: weights and buffers that are not trained, with every copy of the base model that a method holds.
        trained: weights that are trained, their gradients, and AdamW's two moments, each in the weight's dtype; among
            them the heads of all tasks, of which one at a time is trained.
        kept: what the forward pass of the largest step keeps for backward outside parameters and buffers.
        logits: what the output layer gives in that step.
    """

    frozen: int | None = None
    trained: int | None = None
    kept: int | None = None
    logits: int | None = None

    @property
    def total(self) -> int | None:
        """The sum, where every part of it is known."""
        parts = (self.frozen, self.trained, self.kept, self.logits)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def resident(method: Method, model: nn.Module, fresh: Callable[[], nn.Module]) -> Memory:
    """What is there between steps, without heads.

    Args:
        method: the method.
        model: to which it was applied, on the meta device.
        fresh: gives another base model, for what a method holds besides.
    """
    copies: list[nn.Module] = []

    def load() -> nn.Module:
        copies.append(fresh())
        return copies[-1]

    if method.trains_backbone:
        method.base_logits(model, load)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    others = [tensor for copy in copies for tensor in (*copy.parameters(), *copy.buffers())]
    return Memory(
        frozen=_bytes([*frozen, *model.buffers(), *others]),
        trained=4 * _bytes([p for p in model.parameters() if p.requires_grad]),
    )


def kept_for_backward(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for backward: each storage once; what the model holds anyway is left out.

    Args:
        model: called with ``batch`` as keywords.
        batch: tensors by name.
    """
    layers = [module for module in model.modules() if isinstance(module, CurloraLayer)]
    bases = [U.basis for layer in layers for U in layer.matrices.values() if U.basis is not None]
    held = itertools.chain(model.parameters(), model.buffers(), *(basis.tensors for basis in bases))
    own = {tensor.untyped_storage()._cdata for tensor in held}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def _hold_fake_bases(model: nn.Module) -> None:
    """There is no weight to read the columns and rows of adapters from: their shapes are what counts."""
    for layer in model.modules():
        if isinstance(layer, CurloraLinear):
            weight: Any = layer.weight
            for U in layer.matrices.values():
                factor = torch.empty(layer.out_features, U.r, dtype=weight.dtype, device=weight.device)
                gathered = torch.empty(U.r, dtype=torch.int64, device=weight.device)
                U.hold(Basis(U.indices, U.fingerprint, factor, gathered, key=b"fake"))


def with_largest_step(
    there: Memory,
    model: nn.Module,
    stream: Stream,
    encoded: Sequence[Encoded],
    learned: Iterable[tuple[Encoded, Sequence[Row]]],
) -> Memory:
    """What is there between steps, and what the largest step takes besides.

    The weights become fake tensors: of the run's device for every choice that is made by it, and without numbers. The
    batch is real, so that a model's code may look at its mask.

    Args:
        there: as :func:`resident` has it.
        model: the method's, on the meta device.
        stream: what is run.
        encoded: its tasks.
        learned: those that something is trained on, each with the rows that are.
    """
    device = process_state().device
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=device)
        _hold_fake_bases(model)
    task_model = TaskModel(model).train()
    largest = Memory(there.frozen, there.trained, 0, 0)
    for step in _largest([_shape(part, rows) for part, rows in learned]):
        for part in (*encoded, step.part):
            task_model.begin(part.number, part.task.classes)
        heads = list(task_model.heads.parameters())
        settings = step.part.settings
        if settings.trainer.get("activation_checkpointing", settings.trainer.get("gradient_checkpointing")):
            task_model.gradient_checkpointing_enable()
        batch = step.batch(Collator(stream.tokenizer, settings.readout))
        batch["num_items_in_batch"] = (batch["labels"] != IGNORED).sum().float()  # as the Trainer gives it
        with _RealMasks(), _mixed_precision(settings.trainer, device), _outputs(task_model) as logits:
            kept = kept_for_backward(task_model, {name: value.to(device) for name, value in batch.items()})
        assert there.trained is not None
        trained = there.trained + _bytes(heads) + 3 * _bytes([p for p in heads if p.requires_grad])
        memory = Memory(there.frozen, trained, kept, sum(logits))
        largest = max(largest, memory, key=lambda one: one.total or 0)
    return largest


@dataclass(frozen=True)
class _Step:
    """The largest step of a task: so many rows of so many tokens, the last ``labels`` of each to be answered."""

    part: Encoded
    rows: int
    length: int
    labels: int

    def within(self, other: _Step) -> bool:
        alike = self.part.task.classes is None, self.part.settings.trainer
        return alike == (other.part.task.classes is None, other.part.settings.trainer) and (
            self.rows <= other.rows and self.length <= other.length and self.labels <= other.labels
        )

    def batch(self, collate: Collator) -> dict[str, Tensor]:
        """All rows as long as the longest, but one a token shorter: padding has a mask, which takes memory too."""
        lengths = [self.length] * self.rows
        if self.rows > 1 and self.length > self.labels:
            lengths[-1] -= 1
        rows: list[Row] = []
        for length in lengths:
            ahead = [IGNORED] * (length - self.labels)
            labels = 0 if self.part.task.classes is not None else [*ahead, *[0] * self.labels]
            rows.append({"input_ids": [0] * length, "labels": labels, "task": self.part.number})
        return collate(rows)


def _shape(part: Encoded, rows: Sequence[Row]) -> _Step:
    per_process = part.settings.batch_size // process_state().num_processes
    labels = 1
    if part.task.classes is None:
        labels = max(sum(label != IGNORED for label in row["labels"]) for row in part.train)
    return _Step(part, min(per_process, len(rows)), max(len(row["input_ids"]) for row in rows), labels)


def _largest(steps: Sequence[_Step]) -> list[_Step]:
    """Those that no other is at least as large as."""
    found: list[_Step] = []
    for step in steps:
        if not any(step.within(other) for other in found):
            found = [*(other for other in found if not other.within(step)), step]
    return found


class _RealMasks(TorchDispatchMode):
    """Lets a real mask choose from a fake tensor, which does not know how much a mask chooses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            indices: list[Tensor | None] = []
            for index in args[1]:
                real_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
                indices += index.nonzero(as_tuple=True) if real_mask else [index]
            args = (args[0], indices)
        return func(*args, **(kwargs or {}))


def _mixed_precision(trainer: dict[str, Any], device: torch.device) -> contextlib.AbstractContextManager[object]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if trainer.get(name):
            return torch.autocast(device.type, dtype=dtype)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _outputs(model: TaskModel) -> Iterator[list[int]]:
    """Collects the bytes of what output layers give."""
    sizes: list[int] = []
    layers = [model.language_model.get_output_embeddings(), *model.heads.values()]
    hooks = [layer.register_forward_hook(lambda _, __, output: sizes.append(output.nbytes)) for layer in layers]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
