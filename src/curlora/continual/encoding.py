"""A stream as tokens: each task's rows, encoded once for all methods and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from curlora.continual.generation import Generation
from curlora.continual.methods import Method
from curlora.continual.settings import Settings
from curlora.continual.tasks import Row, Task

__all__ = ["Encoded", "encode", "evaluation_batch_size", "in_order", "trained_by"]


@dataclass(frozen=True)
class Encoded:
    """A task as rows, ready for training and scoring, with its settings.

    Args:
        task: the task, with only the examples that have a row.
        number: the task's number in the stream, from 0.
        train: the training rows.
        evaluation: the evaluation rows.
        settings: the task's settings.
        generation: the prompts for scoring by generation, if answers are generated.
        too_long: the numbers of examples that were cut or left out: ``train_cut``, ``train_dropped``,
            ``evaluation_cut``, ``evaluation_dropped``.
    """

    task: Task
    number: int
    train: Sequence[Row]
    evaluation: Sequence[Row]
    settings: Settings
    generation: Generation | None = None
    too_long: Mapping[str, int] = field(default_factory=dict)


def encode(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Encoded]:
    """Tokenize a stream, once for all methods and seeds.

    Raises:
        ValueError: if an example has no token to learn or score.
    """
    encoded = []
    for number, task in enumerate(tasks):
        own = settings.changed(dict(task.training))
        splits = {split: task.encode(split, tokenizer, own.max_length) for split in ("train", "evaluation")}
        too_long: dict[str, int] = {}
        for name, split in splits.items():
            too_long |= {f"{name}_cut": split.cut, f"{name}_dropped": len(getattr(task, name)) - len(split.kept)}
            for row in split.rows:
                row["task"] = number
        if too_long["train_dropped"] or too_long["evaluation_dropped"]:
            task = task.only(**{name: split.kept for name, split in splits.items()})
        prompts = task.prompts(tokenizer, own.max_length)
        generation = None if prompts is None else Generation(task.name, prompts, evaluation_batch_size(own))
        if own.order == "shuffled":  # sorting by length keeps padding low
            splits["evaluation"].rows.sort(key=lambda row: len(row["input_ids"]))
        rows, scored = splits["train"].rows, splits["evaluation"].rows
        encoded.append(Encoded(task, number, rows, scored, own, generation, too_long))
    return encoded


def in_order(stream: Sequence[Encoded], order: Sequence[str]) -> list[Encoded]:
    """Return the tasks in another order, renumbered.

    Args:
        stream: the tasks from :func:`encode`.
        order: the names of all its tasks; the stream's own order if empty.
    """
    names = [part.task.name for part in stream]
    ordered = []
    for number, part in enumerate(stream[names.index(name)] for name in order or names):
        if part.number != number:
            train, evaluation = ([{**row, "task": number} for row in rows] for rows in (part.train, part.evaluation))
            part = replace(part, number=number, train=train, evaluation=evaluation)
        ordered.append(part)
    return ordered


def trained_by(method: Method, stream: Sequence[Encoded]) -> list[Encoded]:
    """Return the tasks with the method's own settings."""
    return [replace(part, settings=part.settings.changed(method.training)) for part in stream]


def evaluation_batch_size(settings: Settings) -> int:
    """Return the number of examples in a batch when scoring, over all processes."""
    return 1 if settings.evaluation == "one_by_one" else settings.evaluation_batch_size
