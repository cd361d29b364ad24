"""Batches of a task's own examples take no more memory than those of the guard's text."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from curlora.budget.examples import Examples
from curlora.guard import GuardError
from tests.models import llama


def collate(rows):
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": ids}


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), tokens=st.integers(1, 100))
def test_each_example_is_in_one_batch_and_long_ones_are_fewer(lengths, tokens):
    rows = [{"input_ids": torch.full((length,), i + 1)} for i, length in enumerate(lengths)]
    found = Examples(SimpleNamespace(dataset=rows, collate_fn=collate), 8, tokens, seed=0)
    batches = [batch["input_ids"] for batch in found.batches(llama())]
    assert sorted(int(row[0]) for ids in batches for row in ids) == list(range(1, len(rows) + 1))
    assert all(ids.numel() <= tokens or len(ids) == 1 for ids in batches)
    assert all(len(ids) <= 8 for ids in batches)
    assert found.tokens == sum(ids.numel() for ids in batches)


@pytest.mark.parametrize("streamed", [False, True])
def test_one_label_among_many_examples_is_found(streamed):
    """What is chosen first has none, as of many long prompts that leave no room for the answer."""
    rows = [{"input_ids": torch.full((4,), i + 1), "labels": torch.full((4,), -100)} for i in range(400)]
    rows[317]["labels"] = rows[317]["input_ids"]

    def with_labels(batch):
        return {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows)

    loader = SimpleNamespace(dataset=Stream() if streamed else rows, collate_fn=with_labels)
    found = Examples(loader, 8, 100, seed=0)
    found.check()
    assert found.problem is None
    assert any(bool((batch["labels"] == 318).all(1).any()) for batch in found.batches(llama()))
    rows[317]["labels"] = rows[0]["labels"]
    with pytest.raises(GuardError, match="Every label of 400 examples is masked"):
        Examples(loader, 8, 100, seed=0).check()


def test_a_stream_without_an_end_and_without_labels_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield {"input_ids": torch.arange(4)}

    def masked(batch):
        ids = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": torch.full_like(ids, -100)}

    with pytest.raises(GuardError, match="Every label of 8,192 examples is masked"):
        Examples(SimpleNamespace(dataset=Endless(), collate_fn=masked), 64, 1000, seed=0).check()


def test_a_stream_that_can_be_read_only_once_is_left_to_the_training():
    class Stream(IterableDataset):
        def __init__(self):
            self.rows = iter([{"input_ids": torch.arange(4)}] * 9)

        def __iter__(self):
            return self.rows

    stream = Stream()
    found = Examples(SimpleNamespace(dataset=stream, collate_fn=collate), 8, 100, seed=0)
    assert found.problem == "the data can be iterated only once"
    assert len(list(stream)) == 9
