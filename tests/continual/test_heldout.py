"""Perplexity and drift equal their definitions, computed position by position."""

import math
from contextlib import nullcontext

import pytest
import torch

from curlora.continual.heldout import HeldOut, measure
from curlora.continual.methods import make_method
from tests.models import VOCABULARY, gpt2, llama


def text(length, seed=0):
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def perplexity(model, tokens, window, stride=None):
    return measure(model, HeldOut("text", tokens, window, stride)).perplexity


def positions(tokens, window, stride):
    """Return each scored token with its context within the window."""
    done = set()
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        for position in range(begin + 1, end):
            if position not in done:
                done.add(position)
                yield tokens[begin:position], tokens[position]
        if end == len(tokens):
            break


def prediction(model, context):
    with torch.no_grad():
        return model(context[None]).logits[0, -1].double().log_softmax(-1)


def slow(model, tokens, window, stride):
    losses = [-float(prediction(model, context)[token]) for context, token in positions(tokens, window, stride)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (10, 1), (50, 50), (7, 3), (2, 1)])
def test_it_is_the_definition(base, window, stride):
    model, tokens = base(), text(31)
    assert perplexity(model, tokens, window=window, stride=stride) == pytest.approx(
        slow(model, tokens, window, stride), rel=1e-5
    )


@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (50, 50)])
@pytest.mark.parametrize("kind", ["curlora", "full"])
def test_drift_is_the_mean_divergence_from_the_base(kind, window, stride):
    options = {"r": 4} if kind == "curlora" else {}
    method = make_method(kind, "m", "M", learning_rate=0.1, options=options)
    model = method.apply(llama(), seed=0)
    base_logits = method.base_logits(model, llama)
    tokens = text(31)
    language_model = model.get_base_model() if kind == "curlora" else model
    held = HeldOut("t", tokens, window, stride)
    assert measure(language_model, held, base_logits).drift == pytest.approx(0, abs=1e-7)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a change that is large enough for a divergence above rounding errors
            torch.nn.init.normal_(parameter, std=1e3 if kind == "curlora" else 0.3)
    got = measure(language_model, held, base_logits)
    base = llama()
    expected = []
    for context, _ in positions(tokens, window, stride):
        p, q = prediction(base, context), prediction(language_model, context)
        expected.append(float((p.exp() * (p - q)).sum()))
    assert got.drift == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert got.drift > 1e-3
    assert got.perplexity == pytest.approx(slow(language_model, tokens, window, stride), rel=1e-5)


def test_a_text_shorter_than_the_window_is_one_chunk():
    held = HeldOut("t", text(20), window=50)
    assert held.windows == 1
    assert held.describe() == "t (20 tokens, one chunk)"
    assert perplexity(llama(), text(20), window=50) == pytest.approx(slow(llama(), text(20), 50, 50), rel=1e-5)


def test_windows_are_counted_and_described():
    calls = []
    held = HeldOut("t", text(31), window=10, stride=4)
    measure(llama(), held, progress=lambda *_: nullcontext(calls.append))
    assert sum(calls) == held.windows
    assert held.describe() == "t (31 tokens, windows of 10, stride 4)"


def test_the_model_comes_back_as_it_was():
    model = llama().train()
    perplexity(model, text(20), window=8)
    assert model.training


@pytest.mark.parametrize(
    ("length", "window", "stride", "message"),
    [
        (1, 8, 8, "at least 2 tokens, got 1"),
        (9, 8, 9, "got stride=9 and window=8"),
        (9, 8, 0, "got stride=0"),
        (9, 1, 1, "window=1"),
    ],
)
def test_bad_windows_are_refused(length, window, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama(), text(length), window=window, stride=stride)


def test_a_uniform_model():
    model = llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, text(64), window=16) == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_model_that_diverged_has_infinite_perplexity():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, text(20), window=8) == math.inf


def test_a_model_of_no_numbers_has_no_drift():
    model = llama()
    model.lm_head.weight.data.fill_(math.nan)
    base = llama()
    got = measure(model, HeldOut("t", text(20), window=8), lambda ids, kept: base(ids, logits_to_keep=kept).logits)
    assert math.isnan(got.drift)
    assert math.isnan(got.perplexity)
