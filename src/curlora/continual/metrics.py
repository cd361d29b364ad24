"""Metrics of continual learning, computed from the accuracy matrix.

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
    """Return the mean accuracy on all tasks after the last one, ``1/T sum_j a[T, j]`` (Lopez-Paz and Ranzato 2017).

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    return statistics.fmean(accuracy[-1])


def learning_accuracy(accuracy: AccuracyMatrix) -> float:
    """Return the mean accuracy on each task just after it was learned, ``1/T sum_i a[i, i]``: plasticity.

    Riemer et al. 2019, https://arxiv.org/abs/1810.11910.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    return statistics.fmean(row[-1] for row in accuracy)


def forgetting(accuracy: AccuracyMatrix) -> float | None:
    """Return the mean drop of accuracy from its best, ``1/(T-1) sum_{j<T} max_{j<=i<T} a[i, j] - a[T, j]``.

    Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112. Negative if later tasks improved earlier ones.

    Returns:
        The mean over all tasks but the last, or ``None`` for a single task.

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
    """Return the effect of later tasks on earlier ones, ``1/(T-1) sum_{j<T} a[T, j] - a[j, j]``.

    Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840. Negative means forgetting.

    Returns:
        The mean over all tasks but the last, or ``None`` for a single task.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    if len(accuracy) == 1:
        return None
    return statistics.fmean(accuracy[-1][j] - accuracy[j][j] for j in range(len(accuracy) - 1))


def forward_transfer(before: Sequence[float], base: Sequence[float]) -> float | None:
    """Return the effect of earlier tasks on later ones, ``1/(T-1) sum_{i>1} a[i-1, i] - b[i]``.

    Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840. A task with its own head is scored with an untrained
    head, so its contribution is noise around zero. The metric is informative for tasks that the language model itself
    answers.

    Args:
        before: accuracy on each task just before it was learned.
        base: accuracy of the base model on each task.

    Returns:
        The mean over all tasks but the first, or ``None`` for a single task.

    Raises:
        ValueError: if the two differ in length.
    """
    if len(before) != len(base):
        raise ValueError(
            f"before and base must cover the same tasks, got {len(before)} accuracies before the tasks were learned "
            f"and {len(base)} of the base model"
        )
    if len(before) < 2:
        return None
    return statistics.fmean(now - start for now, start in zip(before[1:], base[1:], strict=True))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (``n - 1``) over seeds; ``None`` as the latter for one seed.

    The deviation is NaN if a value is not finite, as for a run that diverged.
    """
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None if len(values) == 1 else math.nan
    return statistics.fmean(values), None if len(values) == 1 else statistics.stdev(values)


def _check(accuracy: AccuracyMatrix) -> None:
    if not accuracy or any(len(row) != i + 1 for i, row in enumerate(accuracy)):
        lengths = [len(row) for row in accuracy]
        raise ValueError(f"the accuracy matrix must be lower triangular, got rows of lengths {lengths}")
