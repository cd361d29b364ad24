"""The tokens of a text that count: the content of messages, not what the chat template adds around it."""

import math
import types

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, LlamaConfig, MambaConfig, XLNetConfig

import curlora
from curlora.guard import perplexity
from curlora.text.rows import Rows, longest_row, named_texts, rows_of
from tests.models import curlora as adapted
from tests.models import llama, multimodal, tokens, word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w91 ', 'assistant': 'w90 ', 'system': 'w92 '}[m.role] + m.content + ' w97 ' }}"
    "{% endfor %}"
)


def talk(*contents):
    return [
        {"role": role, "content": content}
        for role, content in zip(("system", "user", "assistant", "user", "assistant"), contents, strict=False)
    ]


def rows(*conversations, template=TEMPLATE, max_length=64):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer, rows_of("chats", list(conversations), tokenizer, tokens=1000, max_length=max_length)


def test_of_a_conversation_what_is_said_counts():
    tokenizer, (row,) = rows(talk("w1 w2", "w91 w3", "w4", " w5 ", "w90"))
    _, found = rows(talk("w1 w2", "w91 w3", "w4", " w5 ", "w90"))
    assert tokenizer.decode(row) == "w92 w1 w2 w97 w91 w91 w3 w97 w90 w4 w97 w91 w5 w97 w90 w90 w97"
    said = [token for token, counts in zip(tokenizer.decode(row).split(), found.counted[0], strict=True) if counts]
    assert said == ["w91", "w3", "w4", "w5", "w90"]
    assert found.tokens == 5


def test_what_is_said_is_not_looked_for_in_the_template():
    """The template begins with a system prompt of its own, and names the roles in words that are said, too."""
    template = "w92 w1 w97 " + TEMPLATE
    tokenizer, (row,) = rows(talk("w8", "w1", "w90", "w91", ""), template=template)
    _, found = rows(talk("w8", "w1", "w90", "w91", ""), template=template)
    assert tokenizer.decode(row) == "w92 w1 w97 w92 w8 w97 w91 w1 w97 w90 w90 w97 w91 w91 w97 w90 w97"
    assert found.counted[0].nonzero().flatten().tolist() == [7, 10, 13]


def test_of_a_template_that_changes_what_is_said_all_counts():
    changing = TEMPLATE.replace("m.content", "(m.content | replace('w3', 'w4'))")
    _, found = rows(talk("w1", "w2 w3", "w5"), template=changing)
    assert bool(found.counted[0].all())


def test_long_conversations_are_cut_with_what_counts():
    _, found = rows(talk("w1 w2", "w3 w4 w5", "w6 w7"), max_length=5)
    _, (whole,) = rows(talk("w1 w2", "w3 w4 w5", "w6 w7"))
    assert torch.equal(torch.cat(list(found)), whole)
    assert torch.cat(found.counted).tolist() == [False] * 5 + [True] * 3 + [False] * 2 + [True] * 2 + [False]


def test_texts_and_rows_count_as_a_whole():
    found = rows_of("t", ["w1 w2 w3", torch.tensor([4, 5])], word_tokenizer(), tokens=100, max_length=64)
    assert [mask.tolist() for mask in found.counted] == [[True] * 3, [True] * 2]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_of_what_counts(batch_size):
    model, ids = adapted(llama()), tokens(batch=6, length=9)
    counted = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    counted[2] = False  # a row in which no token counts
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(6, 8)
    expected = math.exp(losses[counted[:, 1:]].mean())
    found = perplexity(model, Rows(ids.unbind(), counted.unbind()), batch_size=batch_size, max_length=5)
    cut = [Rows(ids[:, :5].unbind(), counted[:, :5].unbind()), Rows(ids[:, 5:].unbind(), counted[:, 5:].unbind())]
    assert found == pytest.approx(perplexity(model, Rows.joined(cut), batch_size=batch_size), rel=1e-6)
    assert perplexity(model, Rows(ids.unbind(), counted.unbind()), batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )
    assert perplexity(model, Rows(ids.unbind())) == pytest.approx(math.exp(losses.mean()), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The guard's text has")
def test_calibration_is_of_what_counts():
    model, ids = adapted(llama()), tokens(batch=6, length=9)
    counted = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    one = curlora.calibrate(model, Rows(ids.unbind(), counted.unbind()), progress=False)
    whole = curlora.calibrate(model, ids.unbind(), progress=False)
    other = curlora.calibrate(model, [{"input_ids": ids, "labels": ids.masked_fill(~counted, -100)}], progress=False)
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.allclose(state[key].double(), expected[key].double(), rtol=1e-4, atol=1e-12) for key in state)
    assert not all(torch.equal(state[key], value) for key, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=32), 32),
        (GPT2Config(n_positions=64), 64),
        (multimodal().config, 64),
        (XLNetConfig(), None),  # it states -1: any number
        (MambaConfig(), None),
        (types.SimpleNamespace(max_position_embeddings=8), 8),
        (None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_longest_row_of_a_model(config, expected):
    assert longest_row(config) == expected


def test_rows_keep_their_mask():
    """As of the model's own text, in which the template's tokens do not count."""
    rows = Rows([torch.arange(6), torch.arange(4)], [torch.arange(6) > 2, torch.arange(4) > 0])
    again = rows_of("own", rows, None, tokens=9, max_length=4)
    assert [row.tolist() for row in again] == [[0, 1, 2, 3], [4, 5], [0, 1, 2]]
    assert [mask.tolist() for mask in again.counted] == [[False] * 3 + [True], [True] * 2, [False, True, True]]


def test_the_models_own_text_may_stand_beside_others():
    assert named_texts({"own": None, "mine": ["a b"]}) == {"own": None, "mine": ["a b"]}
