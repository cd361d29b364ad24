"""How rows become batches: in which order, and padded how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from curlora.continual.tasks import IGNORED, Row

__all__ = ["Collator", "LengthGrouped"]


class LengthGrouped(Sampler[int]):
    """A new random order for each epoch, in which neighbours are of about the same length.

    A function of the seed and the epoch alone, so that a run that is gone on with in the middle of an epoch, or with
    another number of processes, sees the same order. transformers' own sampler draws from the global generator.

    Args:
        lengths: of the rows, in tokens.
        batch_size: examples of one optimizer step over all processes.
        seed: of the order.
        fillers: further rows, which come last.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, fillers: int = 0) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.fillers = fillers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        return iter([*order, *range(len(order), len(self))])


@dataclass(frozen=True)
class Collator:
    """Pads rows to a batch, on the right whichever side the tokenizer pads on.

    There a causal model's real tokens see no padding and keep their positions; the left is for generating text, and
    with learned positions, such as GPT-2's, shifts them.

    Args:
        tokenizer: says the padding token.
        readout: where a class is read: at the ``"last_token"`` of the text, or at the ``"last_position"`` of the padded
            batch, whatever stands there, as the paper's reference does in its right-padded batches.
    """

    tokenizer: PreTrainedTokenizerBase
    readout: str = "last_token"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Makes a batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, of shape ``(batch, length)``, and ``task``, of shape
            ``(batch,)``. A label stands at the position whose hidden state it is to be told from; -100 elsewhere. Where
            that state is known already, ``states``, of shape ``(batch, width)``, in the place of the first two.
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
