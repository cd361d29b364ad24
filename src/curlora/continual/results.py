"""The contents of ``results.json``. The fields are described in ``docs/results.md``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from curlora.continual import metrics
from curlora.continual.computing import fp32_products
from curlora.storage import write_whole

__all__ = [
    "SCHEMA_VERSION",
    "Guarded",
    "MethodResult",
    "ResultsError",
    "RunResults",
    "Score",
    "SeedResult",
    "Statistic",
    "TaskInfo",
    "TextScore",
    "environment",
    "name_of",
]

SCHEMA_VERSION = 4
_READ = (3, SCHEMA_VERSION)  # fields that version 3 lacks have defaults


class ResultsError(ValueError):
    """A file does not hold valid results of a run."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TaskInfo(_Record):
    """A task of the stream, without its texts.

    ``train_examples`` and ``evaluation_examples`` count the examples that were used. Of these, ``train_cut`` and
    ``evaluation_cut`` were longer than ``max_length`` and were cut. ``train_dropped`` and ``evaluation_dropped`` count
    further examples that were left out because of their length. ``evaluation_in_train`` counts evaluation examples that
    are also in the training split.
    """

    name: str
    kind: str
    metric: str
    description: str
    labels: list[str]
    train_examples: int
    evaluation_examples: int
    majority_rate: float
    train_cut: int = 0  # defaults: older results lack these fields
    train_dropped: int = 0
    evaluation_cut: int = 0
    evaluation_dropped: int = 0
    evaluation_in_train: int = 0


class Score(_Record):
    """The score on one task: ``accuracy``, or the task's metric, between 0 and 1, and mean ``loss`` per label in nats.

    ``unfinished`` is the share of generated answers that were cut off at ``max_new_tokens``.
    """

    accuracy: float
    loss: float
    unfinished: float = 0.0

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: for completion and chat tasks, the perplexity of the completions."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class TextScore(_Record):
    """The score on a held-out text: perplexity, and drift from the base model in nats per token."""

    perplexity: float
    drift: float


class Guarded(_Record):
    """How a limit on forgetting was kept over one task.

    ``perplexity_rise`` is the rise of the perplexity of the guard's text relative to the base model, measured after the
    task. ``kl`` is the KL divergence from the base model on that text in nats per token, if the limit is on it.
    ``limit`` bounds ``kl`` if it is given, else ``perplexity_rise``. ``scale`` is the fraction of the task's change
    that was left after it was scaled back; 1 means all of it. ``predicted`` is the drift that a guard predicted, in
    nats per token.
    """

    predicted: float | None = None
    perplexity_rise: float
    kl: float | None = None
    limit: float
    scale: float


class SeedResult(_Record):
    """The results of one method over the stream with one seed.

    ``order`` names the tasks in the order in which they were learned, if that is not the stream's own order. The
    indices ``i`` and ``j`` below count in this order.

    ``scores[i][j]`` is the score on task ``j`` after task ``i``. ``before[i]`` is the score on task ``i`` just before
    it was learned, and ``base[i]`` the base model's; both are measured only under ``forward_transfer``.
    ``heldout[name][0]`` is the base model's score on a held-out text, and ``heldout[name][i + 1]`` the score after task
    ``i``. ``losses`` are pairs ``(step, loss)`` over the whole stream, and ``drifts`` pairs of a step and the drift
    that a guard predicted there. ``guarded[i]`` says how the limit was kept over task ``i``. Times are in seconds.
    """

    seed: int
    order: list[str] = []
    scores: list[list[Score]]
    before: list[Score]
    base: list[Score]
    heldout: dict[str, list[TextScore]]
    losses: list[tuple[int, float]]
    drifts: list[tuple[int, float]] = []  # defaults: runs begun by older versions can be resumed
    guarded: list[Guarded] = []
    steps: int
    train_tokens: int
    train_seconds: float
    seconds: float

    @property
    def accuracy(self) -> list[list[float]]:
        return [[score.accuracy for score in row] for row in self.scores]

    @property
    def average_accuracy(self) -> float:
        return metrics.average_accuracy(self.accuracy)

    @property
    def learning_accuracy(self) -> float:
        return metrics.learning_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float | None:
        return metrics.forgetting(self.accuracy)

    @property
    def backward_transfer(self) -> float | None:
        return metrics.backward_transfer(self.accuracy)

    @property
    def forward_transfer(self) -> float | None:
        return metrics.forward_transfer([s.accuracy for s in self.before], [s.accuracy for s in self.base])

    def text(self, name: str | None = None) -> list[TextScore]:
        """Return the scores on a held-out text; on the first one if no name is given."""
        return next(iter(self.heldout.values())) if name is None else self.heldout[name]

    def lost(self, name: str, figure: Literal["kl", "rise"] = "kl") -> float:
        """Return the forgetting on a text over the stream: KL in nats per token, or the relative rise of perplexity."""
        before, after = self.heldout[name][0], self.heldout[name][-1]
        return after.drift if figure == "kl" else after.perplexity / before.perplexity - 1

    @property
    def perplexity_rise(self) -> float:
        """Relative rise of the first text's perplexity over the whole stream; 0.01 means 1 %."""
        return self.lost(next(iter(self.heldout)), "rise")


class Statistic(_Record):
    """A figure over seeds.

    Args:
        mean: the mean.
        deviation: the sample standard deviation; ``None`` with one seed.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Compute the statistic from one value per seed."""
        mean, deviation = metrics.mean_and_deviation(values)
        return cls(mean=mean, deviation=deviation)


class MethodResult(_Record):
    """The results of one method with all seeds.

    ``training`` holds the settings that were different for this method, and ``grid`` its values in the recipe's grid.
    """

    name: str
    label: str
    method: str
    options: dict[str, Any]
    plugins: list[dict[str, Any]]
    learning_rate: float
    trainable_parameters: int
    adapter_bytes: int
    seeds: list[SeedResult]
    training: dict[str, Any] = {}
    grid: dict[str, Any] = {}

    @property
    def entry(self) -> str:
        """The name of the method's entry in the recipe; methods of one grid share an entry."""
        return self.name.partition("@")[0]

    def over_seeds(self, figure: Callable[[SeedResult], float | None]) -> Statistic | None:
        """Return a figure over seeds, or ``None`` if a seed lacks it."""
        values = [figure(seed) for seed in self.seeds]
        known = [value for value in values if value is not None]
        return Statistic.of(known) if len(known) == len(values) else None

    def accuracy(self, i: int, j: int) -> Statistic:
        """Return the accuracy on task ``j`` after task ``i``."""
        return self.score(i, j, "accuracy")

    def score(self, i: int, j: int, figure: str) -> Statistic:
        """Return a figure of the :class:`Score` on task ``j`` after task ``i``."""
        return Statistic.of([getattr(seed.scores[i][j], figure) for seed in self.seeds])

    @property
    def average_accuracy(self) -> Statistic:
        return Statistic.of([seed.average_accuracy for seed in self.seeds])

    @property
    def learning_accuracy(self) -> Statistic:
        return Statistic.of([seed.learning_accuracy for seed in self.seeds])

    @property
    def forgetting(self) -> Statistic | None:
        return self.over_seeds(lambda seed: seed.forgetting)

    @property
    def backward_transfer(self) -> Statistic | None:
        return self.over_seeds(lambda seed: seed.backward_transfer)

    @property
    def forward_transfer(self) -> Statistic | None:
        return self.over_seeds(lambda seed: seed.forward_transfer)

    @property
    def perplexity(self) -> Statistic:
        """Perplexity of the first held-out text after the last task."""
        return Statistic.of([seed.text()[-1].perplexity for seed in self.seeds])

    @property
    def drift(self) -> Statistic:
        """Drift on the first held-out text after the last task, in nats per token."""
        return Statistic.of([seed.text()[-1].drift for seed in self.seeds])

    @property
    def perplexity_rise(self) -> Statistic:
        return Statistic.of([seed.perplexity_rise for seed in self.seeds])

    def lost(self, name: str, figure: Literal["kl", "rise"] = "kl") -> Statistic:
        """Return the forgetting on a text over the stream: KL in nats per token, or the relative rise of perplexity."""
        return Statistic.of([seed.lost(name, figure) for seed in self.seeds])

    def lost_on(
        self, names: Sequence[str], over: Callable[[list[float]], float], figure: Literal["kl", "rise"] = "kl"
    ) -> Statistic:
        """Return the forgetting on several texts, reduced in each run by ``over``, such as ``fmean`` or ``max``."""
        return Statistic.of([over([seed.lost(name, figure) for name in names]) for seed in self.seeds])

    def guarded(self, task: int) -> dict[str, Statistic | None] | None:
        """Return the fields of :class:`Guarded` for a task over seeds, or ``None`` if there is no limit."""
        records = [seed.guarded[task] for seed in self.seeds if task < len(seed.guarded)]
        if not records:
            return None
        fields = {name: [getattr(of, name) for of in records] for name in Guarded.model_fields}
        return {name: None if None in values else Statistic.of(values) for name, values in fields.items()}

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second over all seeds."""
        seconds = sum(seed.train_seconds for seed in self.seeds)
        return sum(seed.train_tokens for seed in self.seeds) / seconds if seconds else None

    @property
    def seconds(self) -> float:
        """Mean time of one seed in seconds."""
        return Statistic.of([seed.seconds for seed in self.seeds]).mean


class RunResults(_Record):
    """The results of a whole run: one stream, several methods, one or more seeds.

    ``heldout`` describes the texts whose perplexity is measured, by name. ``shown`` names those of them that plug-ins
    may use. ``limits`` are the recipe's limits. ``missing`` names the methods and seeds that have not been finished.
    """

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    base_model: str
    base_parameters: int
    heldout: dict[str, str]
    shown: list[str] = []
    limits: dict[str, list[float]] = {}
    missing: list[str] = []
    protocol: dict[str, str]
    settings: dict[str, Any]
    recipe: dict[str, Any] | None
    environment: dict[str, str]
    tasks: list[TaskInfo]
    methods: list[MethodResult]

    @property
    def seeds(self) -> list[int]:
        """The seeds that any method was run with."""
        return sorted({seed.seed for method in self.methods for seed in method.seeds})

    @property
    def in_orders(self) -> bool:
        """Whether the tasks were learned in other orders, too."""
        return any(seed.order for method in self.methods for seed in method.seeds)

    @property
    def runs(self) -> int:
        """The number of finished runs of one method with one seed in one order of the tasks."""
        return sum(len(method.seeds) for method in self.methods)

    @property
    def unseen(self) -> list[str]:
        """The texts that no method uses."""
        return [name for name in self.heldout if name not in self.shown]

    def by_order(self) -> dict[tuple[str, ...], RunResults]:
        """Split the results by the order of the tasks, given by their names; the stream's own order comes first."""
        own = [task.name for task in self.tasks]
        orders = dict.fromkeys(tuple(seed.order or own) for method in self.methods for seed in method.seeds)
        return {order: self._in_order(order, own) for order in sorted(orders, key=lambda order: order != tuple(own))}

    def _in_order(self, order: tuple[str, ...], own: list[str]) -> RunResults:
        methods = []
        for method in self.methods:
            seeds = [seed for seed in method.seeds if tuple(seed.order or own) == order]
            if seeds:
                methods.append(method.model_copy(update={"seeds": seeds}))
        return self.model_copy(update={"tasks": [self.tasks[own.index(name)] for name in order], "methods": methods})

    def unfinished(self, task: int) -> float:
        """Return the largest share of a task's generated answers that were cut off, over methods, seeds and stages."""
        name = self.tasks[task].name
        places = [
            (seed, seed.order.index(name) if seed.order else task) for method in self.methods for seed in method.seeds
        ]
        return max((row[j].unfinished for seed, j in places for row in seed.scores if j < len(row)), default=0.0)

    def save(self, path: Path | str) -> None:
        """Write the results as JSON, atomically."""
        write_whole(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> RunResults:
        """Read results that :meth:`save` has written.

        Raises:
            ResultsError: naming the file and the field, if the file does not exist or does not hold valid results.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            nothing = "no method of its run has finished yet" if path.parent.is_dir() else "there is no such folder"
            raise ResultsError(f"{path.parent} holds no results: {nothing}.") from None
        try:
            found = json.loads(text).get("schema_version")
        except (ValueError, AttributeError):
            found = None
        if isinstance(found, int) and found not in _READ:
            raise ResultsError(
                f"{path} has version {found} of the schema, but this version of curlora reads only "
                f"{' and '.join(map(str, _READ))}. Run the recipe again, or read the file with the version of curlora "
                "that wrote it."
            )
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            raise ResultsError(f"{path} does not hold valid results of a run: {error}") from error


def name_of(method: str, seed: int, order: Sequence[str]) -> str:
    """Return the name of a method with one seed in messages; ``order`` is empty for the stream's own order."""
    return f"{method}, seed {seed}" + (f", in the order {', '.join(order)}" if order else "")


def environment() -> dict[str, str]:
    """Return the versions and hardware that results depend on."""
    packages = ("curlora", "torch", "transformers", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "products of float32": f"in {fp32_products()}",
    }
