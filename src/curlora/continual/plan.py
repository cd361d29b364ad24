"""What a run would do and need, found out without the base model's weights and without a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from curlora.continual.batches import Collator
from curlora.continual.launch import build
from curlora.continual.memory import Memory, estimate
from curlora.continual.methods import Method
from curlora.continual.plugins import Plugin, TaskContext
from curlora.continual.processes import check_shared_out
from curlora.continual.recipe import Recipe
from curlora.continual.run import Stream
from curlora.continual.sequence import Encoded, encode, in_order, trained_by
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import Row
from curlora.continual.trainer import steps_of

__all__ = ["MethodPlan", "Plan", "make_plan", "tokens_of"]


@dataclass(frozen=True)
class MethodPlan:
    """A method over the whole stream and all seeds.

    Args:
        trained: trained parameters, heads not counted; ``None`` where that cannot be told.
        steps: optimizer steps.
        tokens: trained on.
        windows: of the held-out texts that are scored.
        memory: of the largest step.
    """

    name: str
    label: str
    trained: int | None
    steps: int
    tokens: int
    windows: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Args:
        stream: what is run.
        tasks: as rows.
        base_parameters: of the base model.
        base_windows: held-out windows that are scored on the base model, once for the whole run.
        methods: in order.
    """

    stream: Stream
    tasks: Sequence[Encoded]
    base_parameters: int
    base_windows: int
    methods: Sequence[MethodPlan]


def make_plan(recipe: Recipe) -> Plan:
    """Check a recipe with its data, and count what running it takes.

    Raises:
        RecipeError: as :func:`curlora.continual.launch.build`.
        curlora.continual.tasks.TaskError: if an example becomes nothing that can be learned or scored.
        RunError: if a text is longer than the model has positions, a method cannot be put on the model, or the batch
            size cannot be shared out over the processes.
    """
    stream = build(recipe)
    tasks = encode(stream.tasks, stream.tokenizer, stream.settings)
    for part in tasks:
        check_shared_out(part.settings.batch_size)
    base = recipe.model.load_empty()
    adapted = stream.checked(tasks)
    windows = sum(text.windows for text in stream.texts) + sum(text.rows for text in stream.unwritten)
    runs = len(stream.seeds) * (1 + len(stream.orders))
    quantization = recipe.model.quantization or getattr(base.config, "quantization_config", None)
    heads = sum(part.task.classes or 0 for part in tasks)
    methods = []
    for method in stream.methods:
        model = adapted[method.name]
        by_seed = [
            list(_learned(method, stream, trained_by(method, in_order(tasks, order)), seed))
            for order in ((), *stream.orders)
            for seed in stream.seeds
        ]
        learned = [pair for pairs in by_seed for pair in pairs]
        steps = [estimate(method, model, base, quantization, heads, *pair) for pair in by_seed[-1]]
        methods.append(
            MethodPlan(
                name=method.name,
                label=method.label,
                trained=model.trained,
                steps=sum(steps_of(len(rows), part.settings) for part, rows in learned),
                tokens=sum(tokens_of(rows) * part.settings.epochs for part, rows in learned),
                windows=windows * len(tasks) * runs if method.trains_backbone else 0,
                memory=max(steps, key=lambda memory: memory.total or 0, default=Memory(0, 0, 0, 0)),
            )
        )
    return Plan(stream, tasks, sum(p.numel() for p in base.parameters()), windows, methods)


def _learned(
    method: Method, stream: Stream, tasks: Sequence[Encoded], seed: int
) -> Iterator[tuple[Encoded, Sequence[Row]]]:
    """The tasks that something is trained on, with the rows that are, in the stream's order."""
    plugins = [make() for make in method.plugins]
    adding = [plugin for plugin in plugins if type(plugin).training_rows is not Plugin.training_rows]
    nothing = TaskModel(nn.Identity())
    for part in tasks:
        if not method.trains_backbone and part.task.classes is None:
            continue
        collate = Collator(stream.tokenizer, part.settings.readout)
        rows: Sequence[Row] = part.train
        for plugin in adding:
            rows = plugin.training_rows(TaskContext(part.number, nothing, rows, collate, seed))
        yield part, rows
        for plugin in adding:
            plugin.after_task(TaskContext(part.number, nothing, part.train, collate, seed))


def tokens_of(rows: Sequence[Row]) -> int:
    """How many tokens rows have."""
    return sum(len(row["input_ids"]) for row in rows)
