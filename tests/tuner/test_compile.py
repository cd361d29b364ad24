"""Whole models compiled to one graph: with ``fullgraph`` any graph break is an error."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import cross_entropy

from curlora import CurloraConfig
from tests.models import BASES, curlora, layers, randomize, tokens

MANY = 1 << 15  # entries of a layer's output


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(call, model):
    """Return the logits and the gradients of every ``U`` in one training step."""
    ids = tokens()
    model.zero_grad()
    logits = call(input_ids=ids).logits
    cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    matrices = [U.weight for layer in layers(model) for U in layer.curlora_U.values()]
    return [logits.detach(), *(U.grad for U in matrices if U.requires_grad)]


def error(got, exact):
    """Return the mean of the tensors' relative errors."""
    return sum(float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)) / len(exact)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("active", [["default"], ["default", "second"]], ids=len)
def test_training(base, autocast, active):
    model = curlora(BASES[base](), target_modules="all-linear")
    model.add_adapter("second", CurloraConfig(r=3, seed=1, alpha=0.5, target_modules="all-linear"))
    randomize(model, "second", seed=3)
    model.base_model.set_adapter(active)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = step(model, model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, expected = step(compiled, model), step(model, model)
    assert len(got) == 1 + len(active) * len(layers(model))
    if autocast:  # the compiled model rounds at other places, but has no larger error
        assert error(got, exact) <= 1.3 * error(expected, exact) < 0.05
        return
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", BASES)
def test_inference(base):
    model = curlora(BASES[base]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_all_sizes(training):
    """The graph must not depend on a size, such as the number of tokens from which backward pads the factor."""
    graphs = CompileCounter()
    model = curlora(BASES["llama"](), target_modules="all-linear")
    layer = max(layers(model), key=lambda layer: layer.out_features)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    most = MANY // layer.out_features
    for length in (2, 30, most):
        x = torch.randn(3, length, layer.in_features, requires_grad=training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


def test_an_exported_layer_takes_any_number_of_tokens():
    layer = layers(curlora(BASES["llama"]()))[0]
    most = MANY // layer.out_features
    shapes = {"x": {0: torch.export.Dim("tokens", max=most)}}
    exported = torch.export.export(layer, (torch.randn(7, layer.in_features),), dynamic_shapes=shapes).module()
    for length in (2, most):
        x = torch.randn(length, layer.in_features)
        torch.testing.assert_close(exported(x), layer(x))


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


@needs_compiler
def test_the_sum_is_made_in_the_pass_of_what_follows():
    """The layer's output is not copied before the sum, as it would be by an ``addmm``."""
    layer = layers(curlora(BASES["llama"]()))[0]
    compiled = torch.compile(lambda x: torch.relu(layer(x)), fullgraph=True)
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, x)
        torch.testing.assert_close(got, torch.relu(layer(x)))
    adds = code.count("extern_kernels.addmm(")
    assert adds == (layer.get_base_layer().bias is not None)


@needs_compiler
def test_training_by_the_default_backend():
    base = BASES["llama"]()
    base.model.layers = base.model.layers[:1]  # inductor is slow
    model = curlora(base)
    for got, expected in zip(step(torch.compile(model, fullgraph=True), model), step(model, model), strict=True):
        torch.testing.assert_close(got, expected)
