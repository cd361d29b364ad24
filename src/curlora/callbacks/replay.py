"""Replay: training on a few examples of earlier tasks again."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset

__all__ = ["chosen", "replay"]


def replay(dataset: Any, *earlier: Any, examples: int, seed: int = 0) -> Any:
    """Return a task's data set together with some examples of each earlier task.

    This is experience replay with a fixed number of examples per task (Chaudhry et al. 2019,
    https://arxiv.org/abs/1902.10486).

    Args:
        dataset: the data set of the present task.
        earlier: the data sets of the earlier tasks. The choice for each does not depend on the others.
        examples: the number of examples of each earlier task, chosen at random. Smaller tasks are used whole.
        seed: the seed of the choice.

    Returns:
        A ``datasets.Dataset`` if all data sets are of this type. It has the columns of all of them, with ``None`` for
        missing values. Otherwise a ``torch.utils.data.ConcatDataset``.

    Raises:
        ValueError: if ``examples`` is not positive.
    """
    from datasets import Dataset, concatenate_datasets  # slow to import, and `import curlora` imports this module

    if examples < 1:
        raise ValueError(f"examples must be 1 or more, got {examples}.")
    numbers = [chosen(len(one), examples, seed + task) for task, one in enumerate(earlier)]
    if all(isinstance(one, Dataset) for one in (dataset, *earlier)):
        kept = [one.select(which) for one, which in zip(earlier, numbers, strict=True)]
        return concatenate_datasets([dataset, *kept])
    return ConcatDataset([dataset, *(Subset(one, which) for one, which in zip(earlier, numbers, strict=True))])


def chosen(count: int, examples: int, seed: int) -> list[int]:
    """Return ``examples`` of the numbers below ``count`` in random order; all of them if there are fewer."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:examples].tolist()
