"""Perplexity against its definition, computed the slow way."""

import math

import pytest
import torch

from curlora.continual.perplexity import perplexity, window_count
from tests.models import VOCABULARY, gpt2, llama


def slow(model, tokens, window, stride):
    """Each token alone, with the context that its window gives it."""
    total, counted, done = 0.0, 0, set()
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        for position in range(begin + 1, end):
            if position in done:
                continue
            done.add(position)
            with torch.no_grad():
                logits = model(tokens[begin:position][None]).logits[0, -1]
            total -= float(logits.log_softmax(-1)[tokens[position]])
            counted += 1
        if end == len(tokens):
            break
    return math.exp(total / counted)


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (10, 1), (50, 50), (7, 3), (2, 1)])
def test_it_is_the_definition(base, window, stride):
    model = base()
    tokens = torch.randint(0, VOCABULARY, (31,), generator=torch.Generator().manual_seed(0))
    got = perplexity(model, tokens, window=window, stride=stride)
    assert got == pytest.approx(slow(model, tokens, window, stride), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity():
    model = llama()
    model.lm_head.weight.data.zero_()
    tokens = torch.randint(0, VOCABULARY, (64,))
    assert perplexity(model, tokens, window=16) == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_model_that_diverged_has_infinite_perplexity():
    model = llama()
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, torch.randint(0, VOCABULARY, (64,)), window=16) == math.inf


def test_progress_is_told_every_window_and_training_mode_comes_back():
    model = llama().train()
    seen = []
    perplexity(model, torch.arange(31), window=10, stride=7, on_window=lambda: seen.append(1))
    assert len(seen) == window_count(31, 10, 7)
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([3]), {}, "at least 2 tokens, got 1"),
        (torch.arange(9), dict(window=4, stride=5), "stride"),
        (torch.arange(9), dict(window=4, stride=0), "stride"),
        (torch.arange(9), dict(window=1), "window"),
    ],
)
def test_bad_options(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama(), tokens, **options)
