"""The loss is the mean over tokens of answers, whatever the batches; replies are the model's own."""

import math

import pytest
import torch

from curlora.text.rows import IGNORED
from curlora.train.data import Prompt, Split
from curlora.train.measure import measure
from tests.models import llama, word_tokenizer


def split(lengths, trained):
    rng = torch.Generator().manual_seed(0)
    rows = []
    for length, answer in zip(lengths, trained, strict=True):
        ids = torch.randint(2, 90, (length,), generator=rng).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length - answer) + ids[length - answer :]})
    return Split(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_token_of_an_answer_counts_the_same(batch_size):
    model, held_out = llama(initializer_range=0.2).double(), split([3, 9, 4, 7], [1, 2, 3, 5])
    lost = []
    for row in held_out.rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].detach()
        for scores, label in zip(logits, row["labels"][1:], strict=True):
            if label != IGNORED:
                lost.append(float(torch.logsumexp(scores, 0) - scores[label]))
    assert len(lost) == held_out.trained_tokens == 11
    model.train()
    heard = []
    found = measure(
        model, word_tokenizer(), held_out, [], stop=frozenset(), reply_tokens=1, batch_size=batch_size,
        on_tokens=heard.append,
    )  # fmt: skip
    assert found.loss == pytest.approx(math.fsum(lost) / len(lost), abs=1e-6)
    assert found.replies == []
    assert model.training
    assert sum(heard) == held_out.tokens


def test_replies_are_greedy_and_end_with_what_ends_a_turn():
    model, tokenizer = llama(initializer_range=0.2), word_tokenizer()
    prompts = [Prompt("", [5, 6, 7]), Prompt("", [9])]
    wanted = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(ids[len(prompt.ids) :])
    how = dict(reply_tokens=6, batch_size=2)
    found = measure(model, tokenizer, split([4], [1]), prompts, stop=frozenset(), **how)
    assert found.replies == [tokenizer.decode(ids) for ids in wanted]
    end = wanted[0][2]
    found = measure(model, tokenizer, split([4], [1]), prompts, stop=frozenset([end]), **how)
    assert found.replies[0] == tokenizer.decode(wanted[0][: wanted[0].index(end)])
