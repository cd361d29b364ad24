"""The plan of a run: its steps, tokens and memory, without the base model's weights and without a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from curlora.continual.batches import Collator
from curlora.continual.encoding import Encoded, in_order, trained_by
from curlora.continual.heldout import HeldOut
from curlora.continual.launch import build
from curlora.continual.memory import Memory, estimate
from curlora.continual.methods import Method
from curlora.continual.plugins import Plugin, TaskContext
from curlora.continual.recipe import Recipe
from curlora.continual.run import encoded_and_checked
from curlora.continual.stream import Stream
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import Row
from curlora.continual.trainer import steps_of

__all__ = ["MethodPlan", "Plan", "make_plan", "tokens_of"]


@dataclass(frozen=True)
class MethodPlan:
    """The plan of one method over the whole stream, all orders and all seeds.

    Args:
        name: the method's name.
        label: the method's name in reports.
        trained: trainable parameters without heads; ``None`` if unknown.
        steps: optimizer steps.
        tokens: tokens that are trained on.
        windows: windows of held-out text that are scored.
        memory: memory of the largest step.
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
    """The plan of a whole run.

    Args:
        stream: the run's stream.
        tasks: the encoded tasks.
        base_parameters: the number of the base model's parameters.
        base_windows: windows of held-out text that are scored with the base model, once for the whole run.
        methods: the methods' plans, in order.
        threads: the number of CPU threads of each method and seed.
        cache: bytes on disk of the cache of frozen layers, at least: without padding, and without texts that the base
            model has to write first. 0 without ``cache_frozen_layers``.
    """

    stream: Stream
    tasks: Sequence[Encoded]
    base_parameters: int
    base_windows: int
    methods: Sequence[MethodPlan]
    threads: int
    cache: int


def make_plan(recipe: Recipe, workers: bool = False) -> Plan:
    """Check a recipe and its data, and compute what running it takes.

    Args:
        recipe: the recipe.
        workers: whether it is to be run on workers.

    Raises:
        RecipeError: see :func:`curlora.continual.launch.build`.
        curlora.continual.tasks.TaskError: if an example has no token to learn or score.
        RunError: if a text is longer than the model has positions, a method cannot be applied to the model, or the
            batch size is not a multiple of the number of processes.
    """
    stream = build(recipe)
    tasks, adapted = encoded_and_checked(stream)
    base: Any = recipe.model.load_empty()
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
    parameters = sum(p.numel() for p in base.parameters())
    cache = _tokens_cached(stream, tasks) * base.config.get_text_config().hidden_size * base.dtype.itemsize
    return Plan(stream, tasks, parameters, windows, methods, recipe.resources.threads(workers), cache)


def _tokens_cached(stream: Stream, tasks: Sequence[Encoded]) -> int:
    """Return the number of tokens in all distinct batches; see :mod:`curlora.continual.frozen_layers`."""
    if not stream.settings.cache_frozen_layers:
        return 0
    by_method = [trained_by(method, tasks) for method in stream.methods if method.trains_backbone]
    trained = 0
    for number, part in enumerate(tasks):
        epochs = max((of[number].settings.epochs for of in by_method), default=1)
        # Shuffled examples form other batches in each epoch and with each seed.
        shuffled = part.settings.order == "shuffled" and not part.settings.fixed_batches and by_method
        trained += tokens_of(part.train) * (epochs * len(stream.seeds) if shuffled else 1)
    scored = sum(tokens_of(part.evaluation) for part in tasks)
    read = sum(len(row) for text in stream.texts for row in text.as_rows())
    return trained + scored + read


def _learned(
    method: Method, stream: Stream, tasks: Sequence[Encoded], seed: int
) -> Iterator[tuple[Encoded, Sequence[Row]]]:
    """Yield the tasks that are trained on, with the rows that are trained on, in the stream's order."""
    plugins = [make() for make in method.plugins]
    adding = [plugin for plugin in plugins if type(plugin).training_rows is not Plugin.training_rows]
    nothing = TaskModel(nn.Identity())
    text = stream.guard_text if isinstance(stream.guard_text, HeldOut) else None
    for part in tasks:
        if not method.trains_backbone and part.task.classes is None:
            continue
        collate = Collator(stream.tokenizer, part.settings.readout)
        rows: Sequence[Row] = part.train
        for plugin in adding:
            rows = plugin.training_rows(TaskContext(part.number, nothing, rows, collate, seed, text))
        yield part, rows
        for plugin in adding:
            plugin.after_task(TaskContext(part.number, nothing, part.train, collate, seed))


def tokens_of(rows: Sequence[Row]) -> int:
    """Return the number of tokens of all rows."""
    return sum(len(row["input_ids"]) for row in rows)
