"""The head that is fitted before training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from curlora.continual import probe
from curlora.continual.batches import Collator
from curlora.continual.task_model import TaskModel
from tests.models import llama, word_examples, word_tokenizer


def problem(seed, n=60, width=8, classes=3):
    """States as in language models: a few entries are large, one is constant."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, width, generator=generator) * torch.logspace(-1, 2, width) + 5
    states[:, 3] = 7.0
    return states, torch.randint(0, classes, (n,), generator=generator)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.01, 0.1, 1.0]), classes=st.integers(2, 4))
def test_it_is_the_best_one(seed, ridge, classes):
    """The objective is convex, so a point with zero gradient is the minimum."""
    states, labels = problem(seed, classes=classes)
    head = torch.nn.Linear(8, classes).double()
    probe.fit(head, states, labels, ridge)
    states = states.double()
    mean, deviation = states.mean(0), states.std(0, correction=0)
    weight = (head.weight * deviation).detach().requires_grad_()
    bias = (head.bias + head.weight @ mean).detach().requires_grad_()
    answers = ((states - mean) / deviation.clamp_min(1e-9)) @ weight.T + bias
    (cross_entropy(answers, labels) + ridge * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5
    assert head.weight[:, 3].eq(0).all()


def test_it_does_not_depend_on_what_was_there():
    states, labels = problem(0)
    heads = [torch.nn.Linear(8, 3) for _ in range(2)]
    for head in heads:
        probe.fit(head, states, labels)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0].bias, heads[1].bias)


def test_classes_that_are_far_apart_are_told_apart_and_the_weights_stay_small():
    states = torch.cat([torch.randn(20, 8) - 10, torch.randn(20, 8) + 10])
    labels = torch.arange(2).repeat_interleave(20)
    head = torch.nn.Linear(8, 2)
    probe.fit(head, states, labels)
    assert (head(states).argmax(-1) == labels).all()
    assert head.weight.abs().max() < 1


def test_states_that_are_not_finite():
    states, labels = problem(0)
    states[3, 2] = torch.nan
    with pytest.raises(ValueError, match="hidden states on the task's examples are not finite"):
        probe.fit(torch.nn.Linear(8, 3), states, labels)


def test_states_are_what_the_head_answers_from():
    model = TaskModel(llama()).train()
    model.begin(0, 2)
    tokenizer = word_tokenizer()
    rows = [
        {"input_ids": tokenizer(words)["input_ids"], "labels": label, "task": 0} for words, label in word_examples(2)[0]
    ]
    collate = Collator(tokenizer)
    states, labels = probe.states_and_labels(model, (collate(rows[i : i + 3]) for i in range(0, len(rows), 3)))
    assert labels.tolist() == [row["labels"] for row in rows]
    answers = model.eval().answers(**collate(rows))
    assert torch.allclose(model.heads["0"](states), answers[0].logits, atol=1e-5)
