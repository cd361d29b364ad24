"""Replay: a few examples of earlier tasks are trained on again."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import ConcatDataset, Subset

__all__ = ["chosen", "replay"]


def replay(dataset: Any, *earlier: Any, examples: int, seed: int = 0) -> Any:
    """A task's data set with some examples of each earlier one.

    Experience replay with a fixed share per task (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486).

    Args:
        dataset: of the task at hand.
        earlier: of the tasks before it; what is kept of each does not depend on the others.
        examples: of each earlier task, chosen at random; all where it has fewer.
        seed: of the choice.

    Returns:
        One of ``datasets`` if all of them are, with the columns that they share; else one of torch.

    Raises:
        ValueError: if ``examples`` is not positive.
    """
    if examples < 1:
        raise ValueError(f"examples must be 1 or more, got {examples}")
    numbers = [chosen(len(one), examples, seed + task) for task, one in enumerate(earlier)]
    if all(isinstance(one, Dataset) for one in (dataset, *earlier)):
        kept = [one.select(which) for one, which in zip(earlier, numbers, strict=True)]
        return concatenate_datasets([dataset, *kept])
    return ConcatDataset([dataset, *(Subset(one, which) for one, which in zip(earlier, numbers, strict=True))])


def chosen(count: int, examples: int, seed: int) -> list[int]:
    """So many of the numbers below ``count``, at random; all if there are fewer."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:examples].tolist()
