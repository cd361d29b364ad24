"""A task of a stream: labelled texts to learn from and labelled texts to be scored on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Example", "Task"]

Example = tuple[str, int]


@dataclass(frozen=True)
class Task:
    """A text-classification task.

    Args:
        name: short name, of letters, digits, ``-`` and ``_``; unique in a stream.
        labels: the names of the classes.
        train: ``(text, class)`` pairs to learn from.
        evaluation: ``(text, class)`` pairs to be scored on.
        description: one sentence for people.

    Raises:
        ValueError: on a name that cannot be a file name, fewer than two classes, an empty split,
            or a class out of range.
    """

    name: str
    labels: Sequence[str]
    train: Sequence[Example]
    evaluation: Sequence[Example]
    description: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"task name {self.name!r} may only hold letters, digits, '-' and '_'")
        if len(self.labels) < 2:
            raise ValueError(f"task {self.name!r} needs at least two labels, got {list(self.labels)}")
        for split in ("train", "evaluation"):
            examples = getattr(self, split)
            if not examples:
                raise ValueError(f"task {self.name!r}: the {split} split is empty")
            for row, (_, label) in enumerate(examples):
                if not 0 <= label < len(self.labels):
                    raise ValueError(
                        f"task {self.name!r}: {split} row {row} has label {label}, outside 0..{len(self.labels) - 1}"
                    )

    @property
    def majority_rate(self) -> float:
        """Accuracy on the evaluation split of always answering its most frequent class."""
        counts = Counter(label for _, label in self.evaluation)
        return max(counts.values()) / len(self.evaluation)
