"""Perplexity of a text, on the same rows as a calibration."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from curlora.guard import GuardError, perplexity
from curlora.text.perplexity import score_text
from curlora.text.rows import Rows
from tests.models import BASES, curlora, llama, multimodal, tokens, word_tokenizer


def test_rows_that_are_longer_than_the_models_positions_are_refused():
    with pytest.raises(GuardError, match="70 tokens; the model has 64 positions"):
        perplexity(multimodal(), tokens(length=70).unbind(), max_length=128)


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_plain_formula(base):
    model = curlora(BASES[base]())
    ids = tokens(batch=5, length=9)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    expected = math.exp(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert perplexity(model, ids.unbind()) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, [{"input_ids": ids}]) == pytest.approx(expected, rel=1e-6)


def test_how_the_text_is_put_into_batches_does_not_matter():
    model = curlora(llama())
    rows = [row[: 3 + i] for i, row in enumerate(tokens(batch=6, length=9).unbind())]
    found = [perplexity(model, rows, batch_size=size) for size in (1, 4, 6)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_texts_are_cut_into_rows():
    model, tokenizer = curlora(llama()), word_tokenizer()
    text = " ".join(f"w{i}" for i in range(20))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    found = perplexity(model, [text], tokenizer, max_length=7)
    assert found == pytest.approx(perplexity(model, ids.split(7)), rel=1e-6)


@pytest.mark.parametrize("ignored", [False, True], ids=["", "the base ignores the option"])
def test_logits_are_computed_from_the_first_token_that_counts(ignored):
    """Two rows of nine tokens, of which the last four and the last two count: the answers after two prompts."""
    model, base = curlora(llama()), llama(seed=1)
    rows = Rows(tokens(batch=2, length=9).unbind(), (torch.arange(9) >= torch.tensor([[5], [7]])).unbind())
    sizes = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))

    def base_logits(ids, kept):
        with torch.no_grad():
            return base(ids, logits_to_keep=0 if ignored else kept).logits

    kept = score_text(model, rows, base_logits=base_logits)
    forward = model.get_base_model().forward
    model.get_base_model().forward = lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache)
    assert kept == pytest.approx(score_text(model, rows, base_logits=base_logits), rel=1e-6)
    assert sizes == [5, 9]
    assert kept[1] > 1e-3


def test_the_model_is_left_as_it_was():
    model = curlora(llama()).train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    perplexity(model, tokens().unbind())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_large_for_a_float_is_infinite():
    model = llama()
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, tokens().unbind()) == math.inf


@pytest.mark.parametrize("nothing", [[], [torch.tensor([3])]], ids=["no text", "one token"])
def test_nothing_to_predict_is_said(nothing):
    with pytest.raises(GuardError, match="no two tokens in a row"):
        perplexity(llama(), nothing)
