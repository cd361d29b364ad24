"""What is measured over a stream of tasks, from the accuracy matrix.

``accuracy[i][j]`` is the accuracy on task ``j`` after training on task ``i``, for ``j <= i``
(Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["average_accuracy", "forgetting"]

AccuracyMatrix = Sequence[Sequence[float]]


def average_accuracy(accuracy: AccuracyMatrix) -> float:
    """Mean accuracy over all tasks after the last one, ``1/T sum_j a[T, j]``.

    Raises:
        ValueError: if the matrix is not lower triangular with at least one row.
    """
    _check(accuracy)
    return sum(accuracy[-1]) / len(accuracy[-1])


def forgetting(accuracy: AccuracyMatrix) -> float | None:
    """Mean loss since the best moment, ``1/(T-1) sum_{j<T} max_{i<T} a[i, j] - a[T, j]``.

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
    lost = [max(accuracy[i][j] for i in range(j, tasks - 1)) - accuracy[-1][j] for j in range(tasks - 1)]
    return sum(lost) / len(lost)


def _check(accuracy: AccuracyMatrix) -> None:
    if not accuracy or any(len(row) != i + 1 for i, row in enumerate(accuracy)):
        lengths = [len(row) for row in accuracy]
        raise ValueError(f"the accuracy matrix must be lower triangular, got rows of {lengths} entries")
