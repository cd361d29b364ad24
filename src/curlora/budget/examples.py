"""A sample of the task's training examples, in batches as the Trainer collates them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from curlora.errors import GuardError
from curlora.text.processes import rank_and_count
from curlora.text.rows import IGNORED
from curlora.tuner.weight import running_device

__all__ = ["Examples"]

COUNT = 128
_LOOKED_AT = 64 * COUNT  # in search of a label; a stream may have no end


class Examples:
    """At most ``COUNT`` of the task's training examples, in batches as the Trainer collates them.

    If every label of the first choice is masked, others are chosen, from the first ``64 * COUNT``.

    Args:
        loader: the Trainer's data loader.
        batch_size: the largest number of examples in a batch.
        tokens: the largest number of tokens in a batch; a longer example forms a batch of its own. Examples may be
            many times as long as the guard's rows, and they run without gradient checkpointing. ``batch_size`` of
            them might not fit into memory.
        seed: the seed of the choice.
    """

    def __init__(self, loader: Any, batch_size: int, tokens: int, seed: int) -> None:
        self.dataset, self.collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        self.batch_size, self.most_tokens = batch_size, tokens
        self.problem: str | None = None
        self._batches: list[dict[str, Tensor]] = []
        self._seen = 0  # examples that were looked at
        if self.dataset is None or self.collate is None:
            self.problem = "the trainer has no data loader to take examples from"
        elif isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__getitem__"):
            if _is_one_pass(self.dataset):
                self.problem = "the data can be iterated only once"
            else:
                self._choose(iter(self.dataset))
        else:
            order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))
            self._choose(self.dataset[i] for i in order.tolist())

    def _choose(self, examples: Iterator[Any]) -> None:
        """Take the first ``COUNT`` examples; while no label of them is left to learn, the next ones."""
        chosen = list(itertools.islice(examples, COUNT))
        while True:
            self._seen += len(chosen)
            self._batches, self.problem = self._read(chosen)
            if self.problem is not None or self._any_label() or self._seen >= _LOOKED_AT:
                return
            if not (chosen := list(itertools.islice(examples, COUNT))):
                return

    def _read(self, chosen: Sequence[Any]) -> tuple[list[dict[str, Tensor]], str | None]:
        """Return the batches, and the reason if they cannot be used, else ``None``."""
        found = [_labelled(batch) for batch in self._collated(chosen)]
        if not found:
            return [], "there are no examples"
        labelled = [batch for batch in found if batch is not None]
        problem = "its batches have no labels for a language model"
        return labelled, problem if found[0] is None else None

    def check(self) -> None:
        """Check that a label is left to learn.

        Raises:
            GuardError: if every label is masked.
        """
        if self.problem is None and not self._any_label():
            raise GuardError(
                f"Every label of {self._seen:,} examples is masked (-100), so there is nothing to learn: are "
                "the answers cut off by max_length, or does the chat template mark no turn as the assistant's?"
            )

    def _any_label(self) -> bool:
        # The first token of a row has nothing before it, so its label is not learned.
        return any(bool((batch["labels"][:, 1:] != IGNORED).any()) for batch in self._batches)

    @property
    def tokens(self) -> int:
        """The number of tokens in all batches, including padding."""
        return sum(batch["input_ids"].numel() for batch in self._batches)

    def batches(self, model: nn.Module, to_device: bool = True) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches of token ids, mask, positions and labels."""
        rank, processes = rank_and_count()
        device, found = running_device(model), self._batches
        # Every process runs the same number of batches, because a sharded model has to run in all of them. The rest is
        # left out. Only if there are fewer batches than processes, several processes run the same one.
        for number in range(rank, max(1, len(found) // processes) * processes, processes):
            batch = found[number % len(found)]
            yield {key: value.to(device) if to_device else value for key, value in batch.items()}

    def _collated(self, chosen: Sequence[Any]) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            for begin in range(0, len(chosen), self.batch_size):
                yield from self._in_batches(chosen[begin : begin + self.batch_size])

    def _in_batches(self, examples: Sequence[Any]) -> Iterator[Any]:
        assert self.collate is not None
        batch = self.collate(examples)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if len(examples) > 1 and isinstance(ids, Tensor) and ids.numel() > self.most_tokens:
            middle = len(examples) // 2
            yield from self._in_batches(examples[:middle])
            yield from self._in_batches(examples[middle:])
        else:
            yield batch


def _is_one_pass(dataset: Any) -> bool:
    """Whether each iteration goes on where the last one has stopped."""
    first = iter(dataset)
    return first is dataset or first is iter(dataset)


def _labelled(batch: Any) -> dict[str, Tensor] | None:
    """Return the parts of a batch that a language model needs, or ``None`` if it has no labels to learn.

    A batch of preference pairs gives the chosen answers only.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    kept = ("input_ids", "attention_mask", "position_ids", "labels")
    found = {key: batch[key] for key in kept if isinstance(batch.get(key), Tensor)}
    if "labels" not in found:
        mask = batch.get("completion_mask")
        if not isinstance(mask, Tensor):
            return None
        half = len(mask) // 2  # TRL puts the rejected answers into the second half
        found = {key: value[:half] for key, value in found.items()}
        found["labels"] = found["input_ids"].masked_fill(mask[:half] == 0, IGNORED)
    return found if found["labels"].shape == found["input_ids"].shape else None
