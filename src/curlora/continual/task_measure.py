"""What the tables and plots of a run show of its tasks: accuracy, or the loss on their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from curlora.continual import metrics
from curlora.continual.results import MethodResult, RunResults, Score, Statistic

__all__ = ["TaskMeasure"]


@dataclass(frozen=True)
class TaskMeasure:
    """The figure of a score that is shown, and the metrics of continual learning in this figure.

    A completion or chat task without generated answers is scored by exact match of whole answers, which says little. If
    all tasks of a run are of this kind, the run is measured by the mean loss per token of the answers. What is learned
    is then the fall of the loss from the base model's, averaged over the tasks, and forgetting is the rise of the loss
    on earlier tasks.

    Args:
        figure: the field of :class:`curlora.continual.results.Score`.
        floor: the value of each task, by name, without any learning: the accuracy of always answering the most frequent
            class, or the base model's loss.
    """

    figure: Literal["accuracy", "loss"]
    floor: Mapping[str, float]

    @classmethod
    def of(cls, results: RunResults) -> TaskMeasure:
        """Return the measure of a run's tasks."""
        frozen = next((method.seeds[0] for method in results.methods if method.method == "frozen"), None)
        if frozen is None or not all(
            task.metric == "exact match" and task.kind != "classification" for task in results.tasks
        ):
            return cls("accuracy", {task.name: task.majority_rate for task in results.tasks})
        names = frozen.order or [task.name for task in results.tasks]
        return cls("loss", {name: score.loss for name, score in zip(names, frozen.scores[-1], strict=True)})

    @property
    def learned_name(self) -> str:
        """What :meth:`learned` returns, in words."""
        return "average accuracy" if self.figure == "accuracy" else "fall of loss, nats"

    @property
    def when_learned_name(self) -> str:
        """What :meth:`when_learned` returns, in words."""
        return "learning accuracy" if self.figure == "accuracy" else "fall when learned"

    @property
    def floor_name(self) -> str:
        """What :attr:`floor` is, in words."""
        return "always the majority class" if self.figure == "accuracy" else "base model"

    def at(self, method: MethodResult, i: int, j: int) -> Statistic:
        """Return the figure on task ``j`` after task ``i``."""
        return method.score(i, j, self.figure)

    def learned(self, method: MethodResult) -> Statistic:
        """Return the mean over all tasks after the last one: accuracy, or the fall of the loss."""
        return self._shifted(method, metrics.average_accuracy)

    def when_learned(self, method: MethodResult) -> Statistic:
        """Return the mean over all tasks, each just after it was learned: accuracy, or the fall of the loss."""
        return self._shifted(method, metrics.learning_accuracy)

    def forgetting(self, method: MethodResult) -> Statistic | None:
        """Return the mean drop of accuracy on earlier tasks from their best, or the mean rise of loss."""
        return method.over_seeds(lambda seed: metrics.forgetting(self._gains(seed.scores)))

    def backward_transfer(self, method: MethodResult) -> Statistic | None:
        """Return the mean gain on earlier tasks since each was learned: in accuracy, or as a fall of the loss."""
        return method.over_seeds(lambda seed: metrics.backward_transfer(self._gains(seed.scores)))

    def forward_transfer(self, method: MethodResult) -> Statistic | None:
        """Return the mean gain on later tasks over the base model, before they are learned."""
        return method.over_seeds(
            lambda seed: metrics.forward_transfer(self._gains([seed.before])[0], self._gains([seed.base])[0])
        )

    def _shifted(self, method: MethodResult, metric: Callable[[Sequence[Sequence[float]]], float]) -> Statistic:
        start = 0.0 if self.figure == "accuracy" else fmean(self.floor.values())
        return Statistic.of([start + metric(self._gains(seed.scores)) for seed in method.seeds])

    def _gains(self, scores: Sequence[Sequence[Score]]) -> list[list[float]]:
        """Return the figures with a sign by which more is better."""
        sign = 1.0 if self.figure == "accuracy" else -1.0
        return [[sign * getattr(score, self.figure) for score in row] for row in scores]
