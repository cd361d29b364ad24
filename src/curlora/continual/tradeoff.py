"""The trade-off between learning and forgetting, and the best of each method within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy

from curlora.continual.results import MethodResult, RunResults, Statistic
from curlora.continual.task_measure import TaskMeasure

__all__ = [
    "Limit",
    "Point",
    "best_within",
    "front",
    "limited_text",
    "limits_of",
    "points",
]


@dataclass(frozen=True)
class Point:
    """One method, or one of a grid of methods, over all its runs.

    Args:
        method: the method.
        learned: how much was learned; see :meth:`curlora.continual.task_measure.TaskMeasure.learned`.
        limited: ``KL(base || model)`` on the text of the limits, in nats per token.
        rise: rise of that text's perplexity as a fraction.
        mean, worst: mean and largest ``KL(base || model)`` over the texts that no method uses, in nats per token.
        mean_rise, worst_rise: mean and largest rise of their perplexity as a fraction.
    """

    method: MethodResult
    learned: Statistic
    limited: Statistic
    rise: Statistic
    mean: Statistic
    worst: Statistic
    mean_rise: Statistic
    worst_rise: Statistic


@dataclass(frozen=True)
class Limit:
    """A limit on the guard's text: a KL divergence in nats per token, or a rise of perplexity as a fraction."""

    figure: Literal["kl", "rise"]
    value: float

    def __str__(self) -> str:
        return f"KL {self.value:g}" if self.figure == "kl" else f"perplexity +{100 * self.value:g} %"

    def keeps(self, point: Point) -> bool:
        """Whether the mean over the point's runs is within the limit."""
        return (point.limited if self.figure == "kl" else point.rise).mean <= self.value


def limits_of(results: RunResults) -> list[Limit]:
    """Return the recipe's limits."""
    return [
        *(Limit("kl", value) for value in results.limits.get("kl", [])),
        *(Limit("rise", value) for value in results.limits.get("perplexity_increase", [])),
    ]


def limited_text(results: RunResults) -> str:
    """Return the name of the text to which limits apply: the guard's, or else the first held-out text."""
    return next(iter(results.shown), next(iter(results.heldout)))


def points(results: RunResults) -> list[Point]:
    """Return one point for each method, in the run's order."""
    measure = TaskMeasure.of(results)
    limited, unseen = limited_text(results), results.unseen or list(results.heldout)
    return [
        Point(
            method,
            measure.learned(method),
            method.lost(limited),
            method.lost(limited, "rise"),
            method.lost_on(unseen, fmean),
            method.lost_on(unseen, numpy.max),  # NaN if any is
            method.lost_on(unseen, fmean, "rise"),
            method.lost_on(unseen, numpy.max, "rise"),
        )
        for method in results.methods
    ]


def best_within(known: Sequence[Point], limit: Limit) -> dict[str, Point | None]:
    """Return the point of each entry of the recipe that has learned most within a limit; ``None`` if none is within."""
    best: dict[str, Point | None] = {}
    for point in known:
        entry = point.method.entry
        present = best.setdefault(entry, None)
        if limit.keeps(point) and (present is None or point.learned.mean > present.learned.mean):
            best[entry] = point
    return best


def front(known: Sequence[Point], figure: Callable[[Point], Statistic] = lambda point: point.mean) -> list[Point]:
    """Return the Pareto front: the points that no other point beats in both learning and forgetting.

    Runs whose figures are not finite are left out.

    Args:
        known: the points of one entry.
        figure: the measure of forgetting; by default the mean divergence on the texts that no method uses.

    Returns:
        The points in ascending order of ``figure``.
    """
    kept: list[Point] = []
    finite = [point for point in known if math.isfinite(figure(point).mean) and math.isfinite(point.learned.mean)]
    for point in sorted(finite, key=lambda point: (figure(point).mean, -point.learned.mean)):
        if not kept or point.learned.mean > kept[-1].learned.mean:
            kept.append(point)
    return kept
