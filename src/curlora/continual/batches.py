"""The order of rows in batches, and their padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from curlora.continual.tasks import Row
from curlora.text.rows import IGNORED

__all__ = ["Collator", "LengthGrouped"]


class LengthGrouped(Sampler[int]):
    """Sampler with a new random order for each epoch, in which neighbouring rows have similar lengths.

    The order depends only on the seed and the epoch. A run that is resumed in the middle of an epoch, or with another
    number of processes, therefore sees the same order. transformers' own sampler draws from the global generator.

    Args:
        lengths: the rows' lengths in tokens.
        batch_size: examples of one batch over all processes.
        seed: seed of the order.
        batches: the number of batches in an optimizer step.
        fixed: whether all seeds and epochs have the same batches, in different orders. The last batch may be smaller
            than the others, and stays last.
        fillers: the number of further rows, which come last.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        batches: int = 1,
        fixed: bool = False,
        fillers: int = 0,
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.fixed = fixed
        self.fillers = fillers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        making = torch.Generator().manual_seed(0) if self.fixed else generator
        order = get_length_grouped_indices(self.lengths, self.batch_size * self.batches, generator=making)
        if self.fixed:
            made = [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
            whole = len(order) // self.batch_size
            order = [row for i in torch.randperm(whole, generator=generator) for row in made[i]]
            order += [row for batch in made[whole:] for row in batch]
        return iter([*order, *range(len(order), len(self))])


@dataclass(frozen=True)
class Collator:
    """Pads rows to a batch on the right, whichever side the tokenizer pads on.

    With padding on the right, a causal model's real tokens see no padding and keep their positions. Padding on the left
    is for generation and shifts learned positions, such as GPT-2's.

    Args:
        tokenizer: provides the padding token.
        readout: the position at which a class is read: the ``"last_token"`` of the text, or the ``"last_position"`` of
            the padded batch, which may be padding. The paper's reference code does the latter.
    """

    tokenizer: PreTrainedTokenizerBase
    readout: str = "last_token"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, shape ``(batch, length)``, and ``task``, shape
            ``(batch,)``. A label stands at the position whose hidden state predicts it; all other positions hold -100.
            If the rows hold that state already, ``states``, shape ``(batch, width)``, replaces the first two, and
            ``labels`` has shape ``(batch, 1)``.
        """
        task = torch.tensor([row["task"] for row in rows])
        if "state" in rows[0]:
            labels = torch.tensor([[row["labels"]] for row in rows])
            return {"states": torch.stack([row["state"] for row in rows]), "labels": labels, "task": task}
        length = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            used = len(row["input_ids"])
            input_ids[i, :used] = torch.tensor(row["input_ids"])
            attention_mask[i, :used] = 1
            if isinstance(row["labels"], int):
                labels[i, -1 if self.readout == "last_position" else used - 1] = row["labels"]
            else:
                labels[i, :used] = torch.tensor(row["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "task": task}
