"""Whole models compiled in one graph: any break in ours is an error under ``fullgraph``."""

import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from curlora import CurloraConfig
from tests.models import BASES, curlora, layers, randomize, tokens


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(call, model):
    """Logits and the gradients of every ``U`` in one step of training."""
    ids = tokens()
    model.zero_grad()
    logits = call(input_ids=ids).logits
    cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    return [logits.detach(), *(U.grad for layer in layers(model) for U in layer.curlora_U.values() if U.requires_grad)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("active", [["default"], ["default", "second"]], ids=len)
def test_training(base, autocast, active):
    model = curlora(BASES[base](), target_modules="all-linear")
    model.add_adapter("second", CurloraConfig(r=3, seed=1, alpha=0.5, target_modules="all-linear"))
    randomize(model, "second", seed=3)
    model.base_model.set_adapter(active)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, expected = step(compiled, model), step(model, model)
    assert len(got) == 1 + len(active) * len(layers(model))
    for a, b in zip(got, expected, strict=True):
        if autocast:  # what is compiled rounds elsewhere
            assert (a - b).float().norm() <= 0.05 * b.float().norm()
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", BASES)
def test_inference(base):
    model = curlora(BASES[base]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_training_by_the_default_backend():
    base = BASES["llama"]()
    base.model.layers = base.model.layers[:1]  # inductor takes its time
    model = curlora(base)
    for got, expected in zip(step(torch.compile(model, fullgraph=True), model), step(model, model), strict=True):
        torch.testing.assert_close(got, expected)
