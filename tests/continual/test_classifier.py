"""Pooling and heads; the paper's reference pools padding, this must not."""

import pytest
import torch
from peft import get_peft_model

from curlora import CurloraConfig
from curlora.continual.classifier import TaskClassifier, last_token
from tests.models import BASES, llama, tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_on_either_side_of_the_padding(side):
    hidden = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    if side == "left":
        mask = mask.flip(1)
    expected = [3, 1, 0] if side == "right" else [3, 3, 3]
    got = last_token(hidden, mask)
    assert torch.equal(got, torch.stack([hidden[i, p] for i, p in enumerate(expected)]))


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without a single token"):
        last_token(torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]))


@pytest.mark.parametrize("base", BASES)
def test_padding_does_not_change_the_answer(base):
    classifier = TaskClassifier(BASES[base]())
    classifier.add_head("t", 3)
    ids = tokens(batch=1, length=5)
    alone = classifier(ids, torch.ones_like(ids))["logits"]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(classifier(padded, mask)["logits"], alone, rtol=1e-5, atol=1e-6)


def test_heads_are_fresh_seeded_kept_and_frozen_when_the_next_comes():
    classifier = TaskClassifier(llama())
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    classifier.add_head("a", 2)
    assert torch.equal(state, torch.random.get_rng_state())
    first = classifier.head("a").weight.clone()
    classifier.add_head("b", 2)
    assert torch.equal(classifier.head("a").weight, first)
    assert torch.equal(classifier.head("b").weight, first)  # the paper's seed, every time
    assert not classifier.head("a").weight.requires_grad
    assert classifier.head("b").weight.requires_grad


@pytest.mark.parametrize("name", ["type", "train", "values", "first-task"])
def test_any_task_name_can_have_a_head(name):
    classifier = TaskClassifier(llama())
    classifier.add_head(name, 2)
    assert classifier.head(name).out_features == 2


def test_the_adapter_is_active_in_the_classifier():
    model = llama()
    ids = tokens()
    plain = TaskClassifier(model)
    plain.add_head("t", 2)
    before = plain(ids, torch.ones_like(ids))["logits"]
    adapted = TaskClassifier(get_peft_model(model, CurloraConfig(r=4)))
    adapted.add_head("t", 2)
    assert torch.equal(adapted(ids, torch.ones_like(ids))["logits"], before)
    for parameter in adapted.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=3.0)
    assert not torch.allclose(adapted(ids, torch.ones_like(ids))["logits"], before)
