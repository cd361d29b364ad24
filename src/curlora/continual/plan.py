"""What a run would do and need, found out without the base model's weights and without a run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from curlora.continual.batches import Collator
from curlora.continual.errors import RunError
from curlora.continual.launch import build
from curlora.continual.methods import Method
from curlora.continual.plugins import Plugin, TaskContext
from curlora.continual.processes import check_shared_out, process_state
from curlora.continual.recipe import ModelPart, Recipe
from curlora.continual.run import Stream
from curlora.continual.sequence import Encoded, encode
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import IGNORED, Row
from curlora.continual.trainer import steps_of

__all__ = ["Memory", "MethodPlan", "Plan", "TaskPlan", "kept_for_backward", "make_plan"]


@dataclass(frozen=True)
class TaskPlan:
    """A task. Tokens and steps are of its own rows, without what plug-ins add.

    ``tokens`` are those trained on in one epoch, ``steps`` the optimizer steps of all epochs, ``longest`` the tokens of
    the longest row that is trained on.
    """

    name: str
    examples: int
    tokens: int
    epochs: int
    steps: int
    longest: int
    evaluation_examples: int
    evaluation_tokens: int


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


@dataclass(frozen=True)
class MethodPlan:
    """A method over the whole stream and all seeds.

    Args:
        trained: how many numbers are trained, heads not counted; ``None`` where it cannot be told.
        steps: optimizer steps.
        tokens: trained on.
        windows: of the held-out texts that are scored.
        unknown: why a figure is ``None``; empty if none is for a reason of the method's.
    """

    name: str
    label: str
    trained: int | None
    steps: int
    tokens: int
    windows: int
    memory: Memory
    unknown: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Args:
        base_numbers: numbers of the base model.
        quantized: whether the base is quantized, so that the bytes of its weights are not known.
        device: what memory is estimated for.
        heldout: what is scored of each text, in words, by its name.
        base_windows: held-out windows that are scored on the base model, once for the whole run.
    """

    title: str
    base_model: str
    base_numbers: int
    quantized: bool
    device: str
    processes: int
    seeds: tuple[int, ...]
    tasks: tuple[TaskPlan, ...]
    methods: tuple[MethodPlan, ...]
    heldout: dict[str, str]
    base_windows: int

    @property
    def steps(self) -> int:
        """Optimizer steps of all methods and seeds."""
        return sum(method.steps for method in self.methods)

    @property
    def tokens(self) -> int:
        """Tokens trained on by all methods and seeds."""
        return sum(method.tokens for method in self.methods)

    @property
    def windows(self) -> int:
        """Held-out windows scored on all methods and seeds, and on the base model."""
        return self.base_windows + sum(method.windows for method in self.methods)


def make_plan(recipe: Recipe) -> Plan:
    """Check a recipe with its data, and count what running it takes.

    The base model is built from its configuration on the meta device. A method that cannot be put on a model without
    weights, such as PEFT's initializations that decompose them, is planned as far as it can be.

    Raises:
        RecipeError: as :func:`curlora.continual.launch.build`.
        curlora.continual.tasks.TaskError: if an example becomes nothing that can be learned or scored.
        RunError: if a method cannot be put on the model, or the batch size cannot be shared out over the processes.
        OSError: if the model has no tokenizer or configuration.
    """
    stream = build(recipe)
    encoded = encode(stream.tasks, stream.tokenizer, stream.settings)
    state = process_state()
    for part in encoded:
        check_shared_out(part.settings.batch_size)
    config = AutoConfig.from_pretrained(
        recipe.model.name, revision=recipe.model.revision, gguf_file=recipe.model.gguf_file
    )
    quantized = recipe.model.quantization is not None or getattr(config, "quantization_config", None) is not None
    base = _without_weights(recipe.model, config)
    return Plan(
        title=stream.title,
        base_model=stream.base_model,
        base_numbers=sum(p.numel() for p in base.parameters()),
        quantized=quantized,
        device=str(state.device),
        processes=state.num_processes,
        seeds=tuple(stream.seeds),
        tasks=tuple(_plan_task(part) for part in encoded),
        methods=tuple(
            _plan_method(method, stream, encoded, lambda: _without_weights(recipe.model, config), quantized)
            for method in stream.methods
        ),
        heldout={text.name: text.describe() for text in stream.heldout},
        base_windows=sum(text.windows for text in stream.heldout),
    )


def kept_for_backward(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, parameters and buffers left out.

    Args:
        model: called with ``batch`` as keywords.
        batch: tensors by name.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def _without_weights(part: ModelPart, config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, part.dtype))


def _plan_task(part: Encoded) -> TaskPlan:
    return TaskPlan(
        name=part.task.name,
        examples=len(part.train),
        tokens=_tokens(part.train),
        epochs=part.settings.epochs,
        steps=steps_of(len(part.train), part.settings),
        longest=max(len(row["input_ids"]) for row in part.train),
        evaluation_examples=len(part.evaluation),
        evaluation_tokens=_tokens(part.evaluation),
    )


def _plan_method(
    method: Method, stream: Stream, encoded: Sequence[Encoded], fresh: Callable[[], nn.Module], quantized: bool
) -> MethodPlan:
    steps = tokens = 0
    learned: list[tuple[Encoded, Sequence[Row]]] = []
    for seed in stream.seeds:
        learned = list(_learned(method, stream, encoded, seed))
        steps += sum(steps_of(len(rows), part.settings) for part, rows in learned)
        tokens += sum(_tokens(rows) * part.settings.epochs for part, rows in learned)
    windows = sum(text.windows for text in stream.heldout) * len(encoded) * len(stream.seeds)

    trained, memory, unknown = None, Memory(), ""
    try:
        try:
            model = method.apply(fresh(), stream.seeds[0])
        except ValueError as error:  # such as modules that are not there: a run would say the same
            raise RunError(f"method {method.name!r} cannot be put on this model: {error}") from error
        numbers = _numbers(model)
        for part in encoded[1:]:
            method.begin_task(model, part.number, stream.seeds[0])
            if method.adapter(part.number) != method.adapter(part.number - 1):
                numbers += _numbers(model)
        trained = numbers
        memory = _resident(method, model, fresh)
        largest = _largest([_shape(part, rows) for part, rows in learned])
        memory = _with_step(memory, model, stream, encoded, largest)
    except RunError:
        raise
    except Exception as error:  # whatever PEFT or a model's code says to tensors without numbers
        first = str(error).strip().partition("\n")[0]
        what = "be put on the model" if trained is None else "make a step"
        unknown = f"could not {what} without the model's weights: {type(error).__name__}: {first}"
    if quantized:
        memory = Memory(None, memory.trained, memory.kept, memory.logits)
    return MethodPlan(
        name=method.name,
        label=method.label,
        trained=trained,
        steps=steps,
        tokens=tokens,
        windows=windows if method.trains_backbone else 0,
        memory=memory,
        unknown=unknown,
    )


def _learned(
    method: Method, stream: Stream, encoded: Sequence[Encoded], seed: int
) -> Iterator[tuple[Encoded, Sequence[Row]]]:
    """The tasks that something is trained on, with the rows that are, in the stream's order."""
    plugins = [make() for make in method.plugins]
    adding = [plugin for plugin in plugins if type(plugin).training_rows is not Plugin.training_rows]
    nothing = TaskModel(nn.Identity())
    for part in encoded:
        if not method.trains_backbone and part.task.classes is None:
            continue
        collate = Collator(stream.tokenizer, part.settings.readout)
        rows: Sequence[Row] = part.train
        for plugin in adding:
            rows = plugin.training_rows(TaskContext(part.number, nothing, rows, collate, seed))
        yield part, rows
        for plugin in adding:
            plugin.after_task(TaskContext(part.number, nothing, part.train, collate, seed))


def _resident(method: Method, model: nn.Module, fresh: Callable[[], nn.Module]) -> Memory:
    """What is there between steps, without heads."""
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


def _with_step(
    resident: Memory, model: nn.Module, stream: Stream, encoded: Sequence[Encoded], steps: Sequence[_Step]
) -> Memory:
    """The memory with that of the largest of some steps.

    The weights become fake tensors: of the run's device for every choice that is made by it, and without numbers. The
    batch is real, so that a model's code may look at its mask.
    """
    device = process_state().device
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=device)
    task_model = TaskModel(model).train()
    largest = Memory(resident.frozen, resident.trained, 0, 0)
    for step in steps:
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
        assert resident.trained is not None
        trained = resident.trained + _bytes(heads) + 3 * _bytes([p for p in heads if p.requires_grad])
        memory = Memory(resident.frozen, trained, kept, sum(logits))
        largest = max(largest, memory, key=lambda one: one.total or 0)
    return largest


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


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
