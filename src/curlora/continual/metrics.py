"""What is measured over a stream of tasks, from the accuracy matrix.

``accuracy[i][j]`` is the accuracy on task ``j`` after training on task ``i``, for ``j <= i``
(Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840, section 3).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "mean_and_deviation",
]

AccuracyMatrix = Sequence[Sequence[float]]


def average_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean accuracy over all tasks after the last one, ``1/T sum_j a[T, j]`` (Lopez-Paz and Ranzato 2017).

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    return statistics.fmean(accuracy[-1])


def learning_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean accuracy on each task just after it was learned, ``1/T sum_i a[i, i]``: plasticity.

    Riemer et al. 2019, https://arxiv.org/abs/1810.11910.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    return statistics.fmean(row[-1] for row in accuracy)


def forgetting(accuracy: AccuracyMatrix) -> float | None:
    """Mean loss since the best moment, ``1/(T-1) sum_{j<T} max_{j<=i<T} a[i, j] - a[T, j]``.

    Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112. Negative where later tasks helped.

    Returns:
        The mean, or ``None`` for a single task, which nothing came after.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    tasks = len(accuracy)
    if tasks == 1:
        return None
    return statistics.fmean(
        max(accuracy[i][j] for i in range(j, tasks - 1)) - accuracy[-1][j] for j in range(tasks - 1)
    )


def backward_transfer(accuracy: AccuracyMatrix) -> float | None:
    """What later tasks did to earlier ones, ``1/(T-1) sum_{j<T} a[T, j] - a[j, j]`` (Lopez-Paz and Ranzato 2017).

    Returns:
        The mean, or ``None`` for a single task. Negative is forgetting.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    if len(accuracy) == 1:
        return None
    return statistics.fmean(accuracy[-1][j] - accuracy[j][j] for j in range(len(accuracy) - 1))


def forward_transfer(before: Sequence[float], base: Sequence[float]) -> float | None:
    """What earlier tasks did for later ones, ``1/(T-1) sum_{i>1} a[i-1, i] - b[i]`` (Lopez-Paz and Ranzato 2017).

    A task with a head of its own is then scored with a fresh head, which knows nothing: the figure says something for
    tasks that the language model answers itself, and is noise about zero for the others.

    Args:
        before: accuracy on each task just before it was learned.
        base: accuracy of the base model on each task.

    Returns:
        The mean, or ``None`` for a single task.

    Raises:
        ValueError: if the two are not of one length.
    """
    if len(before) != len(base):
        raise ValueError(f"accuracies of {len(before)} tasks before they were learned, but of {len(base)} at the start")
    if len(before) < 2:
        return None
    return statistics.fmean(now - start for now, start in zip(before[1:], base[1:], strict=True))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (``n - 1``) over seeds; the latter is ``None`` for one seed.

    Of figures that are not all finite (a run that diverged) the deviation is not a number.
    """
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None if len(values) == 1 else math.nan
    return statistics.fmean(values), None if len(values) == 1 else statistics.stdev(values)


def _check(accuracy: AccuracyMatrix) -> None:
    if not accuracy or any(len(row) != i + 1 for i, row in enumerate(accuracy)):
        lengths = [len(row) for row in accuracy]
        raise ValueError(f"the accuracy matrix must be lower triangular, got rows of {lengths} entries")
