"""What a run leaves behind in ``results.json``. The fields are described in ``docs/results.md``."""

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
from curlora.continual.storage import write_whole

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
_READ = (3, SCHEMA_VERSION)  # what version 3 lacks has defaults


class ResultsError(ValueError):
    """A file does not hold the results of a run."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TaskInfo(_Record):
    """A task of the stream, without its texts.

    Examples are those that were used. Of them ``train_cut`` and ``evaluation_cut`` were longer than ``max_length`` and
    lost what did not fit; beside them ``train_dropped`` and ``evaluation_dropped`` were left out for their length.
    ``evaluation_in_train`` of those to be scored on are learned from too.
    """

    name: str
    kind: str
    metric: str
    description: str
    labels: list[str]
    train_examples: int
    evaluation_examples: int
    majority_rate: float
    train_cut: int = 0  # defaults, so that results from before there were these are read
    train_dropped: int = 0
    evaluation_cut: int = 0
    evaluation_dropped: int = 0
    evaluation_in_train: int = 0


class Score(_Record):
    """Of one task: ``accuracy``, or what the task's metric is, between 0 and 1; the mean ``loss`` per label in nats.

    Where answers were generated, ``unfinished`` is the share of them that were cut off at ``max_new_tokens``.
    """

    accuracy: float
    loss: float
    unfinished: float = 0.0

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: of the completions, for tasks that have any."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class TextScore(_Record):
    """Of a held-out text: perplexity, and drift from the base model in nats per token."""

    perplexity: float
    drift: float


class Guarded(_Record):
    """How a limit on forgetting was kept over one task.

    ``perplexity_rise`` of the guard's own text, relative to the base model, was measured after the task. It is at most
    ``limit``, or where there is a ``kl``, the divergence from the base model on that text in nats per token, that is.
    ``scale`` is what was left of the task's change of the model after it was scaled back: 1 is all of it.
    ``predicted`` is the forgetting that a guard predicted there, in nats per token.
    """

    predicted: float | None = None
    perplexity_rise: float
    kl: float | None = None
    limit: float
    scale: float


class SeedResult(_Record):
    """What one method did over the stream with one seed.

    ``order`` names the tasks in the order in which they were learned, where that is not the stream's own: then ``i``
    and ``j`` below count in it.

    ``scores[i][j]`` is of task ``j`` after task ``i``. ``before[i]`` is of task ``i`` just before it was learned, and
    ``base[i]`` of the base model, where that was asked for. ``heldout[name][0]`` is the base model's,
    ``heldout[name][i + 1]`` the one after task ``i``. ``losses`` are ``(step, loss)`` over the whole stream, and
    ``drifts`` the drift that a guard predicted at these steps. ``guarded[i]`` is how its budget was kept over task
    ``i``. Times in seconds.
    """

    seed: int
    order: list[str] = []
    scores: list[list[Score]]
    before: list[Score]
    base: list[Score]
    heldout: dict[str, list[TextScore]]
    losses: list[tuple[int, float]]
    drifts: list[tuple[int, float]] = []  # defaults, so that what was finished before is gone on with
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
        """Scores of a held-out text, of the first one if no name is given."""
        return next(iter(self.heldout.values())) if name is None else self.heldout[name]

    def lost(self, name: str, figure: Literal["kl", "rise"] = "kl") -> float:
        """What the whole stream cost on a text: ``KL(base || model)`` in nats per token, or the rise of perplexity."""
        before, after = self.heldout[name][0], self.heldout[name][-1]
        return after.drift if figure == "kl" else after.perplexity / before.perplexity - 1

    @property
    def perplexity_rise(self) -> float:
        """Relative rise of the first text's perplexity over the whole stream; 0.01 is one per cent."""
        return self.lost(next(iter(self.heldout)), "rise")


class Statistic(_Record):
    """A figure over seeds: mean, and sample standard deviation where there are several."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Of one figure for each seed."""
        mean, deviation = metrics.mean_and_deviation(values)
        return cls(mean=mean, deviation=deviation)


class MethodResult(_Record):
    """One method, with every seed.

    ``training`` holds the settings that were different for it, ``grid`` what tells it from the others of its grid.
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
        """What the recipe calls it: the methods of one grid have one entry."""
        return self.name.partition("@")[0]

    def over_seeds(self, figure: Callable[[SeedResult], float | None]) -> Statistic | None:
        """A figure over seeds; ``None`` where a seed has none."""
        values = [figure(seed) for seed in self.seeds]
        known = [value for value in values if value is not None]
        return Statistic.of(known) if len(known) == len(values) else None

    def accuracy(self, i: int, j: int) -> Statistic:
        """Accuracy on task ``j`` after task ``i``."""
        return Statistic.of([seed.scores[i][j].accuracy for seed in self.seeds])

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
        """Of the first held-out text, after the last task."""
        return Statistic.of([seed.text()[-1].perplexity for seed in self.seeds])

    @property
    def drift(self) -> Statistic:
        """On the first held-out text, after the last task."""
        return Statistic.of([seed.text()[-1].drift for seed in self.seeds])

    @property
    def perplexity_rise(self) -> Statistic:
        return Statistic.of([seed.perplexity_rise for seed in self.seeds])

    def lost(self, name: str, figure: Literal["kl", "rise"] = "kl") -> Statistic:
        """What the whole stream cost on a text: ``KL(base || model)`` in nats per token, or the rise of perplexity."""
        return Statistic.of([seed.lost(name, figure) for seed in self.seeds])

    def lost_on(
        self, names: Sequence[str], over: Callable[[list[float]], float], figure: Literal["kl", "rise"] = "kl"
    ) -> Statistic:
        """The same over several texts, such as their mean, or by ``max`` the worst of them, in each run."""
        return Statistic.of([over([seed.lost(name, figure) for name in names]) for seed in self.seeds])

    def guarded(self, task: int) -> dict[str, Statistic | None] | None:
        """How the limit was kept over a task, by the fields of :class:`Guarded`; ``None`` where there is no limit."""
        records = [seed.guarded[task] for seed in self.seeds if task < len(seed.guarded)]
        if not records:
            return None
        fields = {name: [getattr(of, name) for of in records] for name in Guarded.model_fields}
        return {name: None if None in values else Statistic.of(values) for name, values in fields.items()}

    @property
    def tokens_per_second(self) -> float | None:
        """Trained on, over all seeds."""
        seconds = sum(seed.train_seconds for seed in self.seeds)
        return sum(seed.train_tokens for seed in self.seeds) / seconds if seconds else None

    @property
    def seconds(self) -> float:
        """Mean time of one seed."""
        return Statistic.of([seed.seconds for seed in self.seeds]).mean


class RunResults(_Record):
    """A whole run: one stream, several methods, one or more seeds.

    ``heldout`` describes the texts that are followed, by name; those in ``shown`` plug-ins may go by.
    ``limits`` are those of the recipe. ``missing`` names what had not been run yet, method and seed.
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
    def runs(self) -> int:
        """How many have been finished: each is one method with one seed in one order of the tasks."""
        return sum(len(method.seeds) for method in self.methods)

    @property
    def unseen(self) -> list[str]:
        """The texts that no method is shown."""
        return [name for name in self.heldout if name not in self.shown]

    def by_order(self) -> dict[tuple[str, ...], RunResults]:
        """The run as one for each order of the tasks, by their names; the stream's own order first."""
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
        """The largest share of a task's generated answers that were cut off, over methods, seeds and stages."""
        name = self.tasks[task].name
        places = [
            (seed, seed.order.index(name) if seed.order else task) for method in self.methods for seed in method.seeds
        ]
        return max((row[j].unfinished for seed, j in places for row in seed.scores if j < len(row)), default=0.0)

    def save(self, path: Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunResults:
        """Read what :meth:`save` wrote.

        Raises:
            ResultsError: if the file is not there, or is not a run's results, naming the file and the field.
        """
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            nothing = (
                "no method of the run in it has been finished yet"
                if path.parent.is_dir()
                else "there is no such folder"
            )
            raise ResultsError(f"{path.parent} holds no results: {nothing}.") from None
        try:
            found = json.loads(text).get("schema_version")
        except (ValueError, AttributeError):
            found = None
        if isinstance(found, int) and found not in _READ:
            raise ResultsError(
                f"{path} is of version {found} of the schema, where this program reads "
                f"{' and '.join(map(str, _READ))}. Run the recipe again, or read it with the version of "
                "curlora that wrote it."
            )
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            raise ResultsError(f"{path} does not hold the results of a run: {error}") from error


def name_of(method: str, seed: int, order: Sequence[str]) -> str:
    """One method with one seed, for people; ``order`` is empty where it is the stream's own."""
    return f"{method}, seed {seed}" + (f", in the order {', '.join(order)}" if order else "")


def environment() -> dict[str, str]:
    """Versions and hardware, as far as results depend on them."""
    packages = ("curlora", "torch", "transformers", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "products of float32": f"in {fp32_products()}",
    }
