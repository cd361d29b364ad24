"""What a run would do and need, found out without the base model's weights and without a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from curlora.continual.batches import Collator
from curlora.continual.errors import RunError
from curlora.continual.launch import build
from curlora.continual.memory import Memory, resident, with_largest_step
from curlora.continual.methods import Method
from curlora.continual.plugins import Plugin, TaskContext
from curlora.continual.processes import check_shared_out, process_state
from curlora.continual.recipe import ModelPart, Recipe
from curlora.continual.run import Stream
from curlora.continual.sequence import Encoded, encode
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import Row
from curlora.continual.trainer import steps_of

__all__ = ["MethodPlan", "Plan", "TaskPlan", "make_plan"]


@dataclass(frozen=True)
class TaskPlan:
    """A task. Tokens and steps are of its own rows, without what plug-ins add.

    ``tokens`` are those trained on in one epoch, ``steps`` the optimizer steps of all epochs, ``longest`` the tokens of
    the longest row that is trained on. ``too_long`` says how many examples were cut or left out, as
    :class:`curlora.continual.sequence.Encoded` has it.
    """

    name: str
    examples: int
    tokens: int
    epochs: int
    steps: int
    longest: int
    evaluation_examples: int
    evaluation_tokens: int
    too_long: Mapping[str, int]


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
        base_parameters: numbers of the base model.
        quantized: whether the base is quantized, so that the bytes of its weights are not known.
        device: what memory is estimated for.
        heldout: what is scored of each text, in words, by its name.
        base_windows: held-out windows that are scored on the base model, once for the whole run.
    """

    title: str
    base_model: str
    base_parameters: int
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
    for part in encoded:
        if part.generation is not None:
            part.generation.check_positions(getattr(config, "max_position_embeddings", None))
    quantized = recipe.model.quantization is not None or getattr(config, "quantization_config", None) is not None
    base = _without_weights(recipe.model, config)
    return Plan(
        title=stream.title,
        base_model=stream.base_model,
        base_parameters=sum(p.numel() for p in base.parameters()),
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
        too_long=part.too_long,
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
        memory = resident(method, model, fresh)
        memory = with_largest_step(memory, model, stream, encoded, learned)
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


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
