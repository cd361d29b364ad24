"""Memory is changed in place where nobody else can see it, and nowhere else."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from curlora import CurloraConfig
from curlora import alone as module
from curlora.alone import alone
from curlora.functional import gather_update, gather_update_

TOKENS, M, R = 6, 5, 2
WEIGHT = torch.randn(M, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INDEX = torch.tensor([3, 1])


def adapted(x, U):
    """A frozen linear layer with a CUR update."""
    return gather_update(x @ WEIGHT.T, U, WEIGHT[:, :R].contiguous(), INDEX)


def by_formula(x, U):
    return x @ (WEIGHT + WEIGHT[:, :R] @ U @ WEIGHT[INDEX]).T


def inputs():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, M, generator=rng, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(R, R, generator=rng, dtype=torch.float64, requires_grad=True)


# Each takes the layer and returns whatever is looked at besides the gradients of its inputs.
def residual(layer, x, U):
    h = x * 1
    (h + layer(h, U)).sin().sum().backward()


def residual_other_order(layer, x, U):
    h = x * 1
    y = layer(h, U)
    (y + h * 1).sin().sum().backward()


def used_twice(layer, x, U):
    y = layer(x * 1, U)
    (y.exp() + y.sin()).sum().backward()


def kept_by_a_hook(layer, x, U, keep=lambda gradient: gradient):
    kept = []
    y = layer(x * 1, U)
    y.register_hook(lambda gradient: kept.append(keep(gradient)))
    y.sin().sum().backward()
    return kept


def kept_as_a_view(layer, x, U):
    return kept_by_a_hook(layer, x, U, lambda gradient: gradient.view(-1)[1:])


def kept_detached(layer, x, U):
    return kept_by_a_hook(layer, x, U, lambda gradient: gradient.detach())


def kept_by_the_node(layer, x, U):
    """A hook on a node is given the gradient after the node has used it."""
    kept = []
    y = layer(x * 1, U)
    y.grad_fn.register_hook(lambda inputs, outputs: kept.append(outputs[0].clone()))
    y.sin().sum().backward()
    return kept


def kept_before_a_view(layer, x, U):
    kept = []
    y = layer(x * 1, U).view(-1)
    y.register_hook(lambda gradient: kept.append(gradient))
    y.sin().sum().backward()
    return kept


def retained(layer, x, U):
    y = layer(x * 1, U)
    y.retain_grad()
    y.sin().sum().backward()
    return [y.grad]


def asked_for(layer, x, U):
    y = layer(x * 1, U)
    found = torch.autograd.grad(y.sin().sum(), [y, x, U])
    return found


def given(layer, x, U, shape=(TOKENS, M)):
    given = torch.arange(TOKENS * M, dtype=torch.float64).view(shape)
    layer(x * 1, U).view(shape).backward(given)
    return [given]


def given_in_another_shape(layer, x, U):
    return given(layer, x, U, (M, TOKENS))


def expanded(layer, x, U):
    layer(x * 1, U).sum().backward()


def twice_through_one_graph(layer, x, U):
    loss = layer(x * 1, U).sin().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def second_derivatives(layer, x, U):
    found = torch.autograd.grad(layer(x * 1, U).sin().sum(), [x, U], create_graph=True)
    sum(g.square().sum() for g in found).backward()
    return found


def checkpointed(layer, x, U, reentrant=False):
    checkpoint(lambda x: layer(x, U).sin(), x * 1, use_reentrant=reentrant).sum().backward()


def checkpointed_reentrant(layer, x, U):
    checkpointed(layer, x, U, reentrant=True)


def halves_of_one_gradient(layer, x, U):
    torch.cat([layer(x * 1, U), x * 3, layer(x * 2, U)]).sin().sum().backward()


def transposed(layer, x, U):
    layer(x * 1, U).view(2, 3, M).transpose(0, 1).sin().sum().backward()


CASES = [
    residual, residual_other_order, used_twice, kept_by_a_hook, kept_as_a_view, kept_detached, kept_by_the_node,
    kept_before_a_view, retained, asked_for, given, given_in_another_shape, expanded, twice_through_one_graph,
    second_derivatives, checkpointed, checkpointed_reentrant, halves_of_one_gradient, transposed,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in_place"])
def test_nothing_that_anyone_else_sees_is_changed(case, in_place):
    def layer(x, U):
        return gather_update_(x @ WEIGHT.T, U, WEIGHT[:, :R].contiguous(), INDEX)

    results = []
    for form in (by_formula, layer if in_place else adapted):
        x, U = inputs()
        seen = case(form, x, U) or []
        results.append([*seen, x.grad, U.grad])
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)


def test_a_gradient_that_is_nobody_elses_is_changed_in_place():
    places = {}

    def note(name):
        return lambda gradient: places.update({name: gradient.data_ptr()})

    x, U = inputs()
    output = x @ WEIGHT.T
    output.register_hook(note("of the output"))
    y = gather_update(output, U, WEIGHT[:, :R].contiguous(), INDEX)
    y.register_hook(note("of the result"))
    y.sin().sum().backward()
    assert places["of the output"] == places["of the result"]


class Noted(nn.Module):
    """Two linear layers in a row, so that the second one's input is part of a graph."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), layer

    def forward(self, x):
        return self.layer(self.first(x).tanh())


def layer_and_formula(base, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(Noted(base), CurloraConfig(r=3, target_modules=["layer"], init_weights=False))
    layer = model.base_model.model.layer
    weight = base.weight + layer.get_delta_weight("default")
    weight = weight.T if isinstance(base, Conv1D) else weight
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = nn.functional.linear(model.base_model.model.first(x).tanh(), weight, base.bias)
    return model, layer, x, expected


BASES = {
    "linear": lambda: nn.Linear(8, 6, bias=False),
    "linear with a bias": lambda: nn.Linear(8, 6),
    "Conv1D": lambda: Conv1D(6, 8),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layer_adds_into_the_output_of_its_base(base, mode):
    model, layer, x, expected = layer_and_formula(BASES[base]())
    places = []
    layer.base_layer.register_forward_hook(lambda module, args, output: places.append(output.data_ptr()))
    with mode():
        y = model(x)
    assert y.data_ptr() == places[0]
    torch.testing.assert_close(y.detach(), expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_output_that_a_hook_keeps_is_left_alone(base, mode):
    model, layer, x, expected = layer_and_formula(BASES[base]())
    kept, copies = [], []

    def keep(module, args, output):
        kept.append(output)
        copies.append(output.detach().clone())

    layer.base_layer.register_forward_hook(keep)
    with mode():
        y = model(x)
    assert torch.equal(kept[0], copies[0])
    torch.testing.assert_close(y.detach(), expected)


class KeepsItsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        y = (x @ weight.T).exp()
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, weight = ctx.saved_tensors
        return (grad * y) @ weight, None


def test_an_output_that_backward_needs_is_left_alone():
    """As of a base layer whose own backward reads its output."""
    x, _ = inputs()
    output = KeepsItsOutput.apply(x, WEIGHT)
    assert not alone(output)


def test_outputs_of_inference_are_alone_only_without_another_name():
    def of(tensor):
        return tensor

    tensor = torch.ones(2, 3) * 2
    assert alone(tensor)
    other = of(tensor)
    assert not alone(tensor)
    del other
    assert alone(tensor)
    assert not alone(tensor.T), "not contiguous"
    assert not alone(nn.Parameter(tensor)), "a subclass"


def test_where_references_cannot_be_counted_nothing_is_alone(monkeypatch):
    def gone(tensor):
        raise AttributeError("_use_count")

    for cached in (module._of_outputs, module._of_gradients):
        cached.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_counts", gone)
        assert module._of_outputs() == module._of_gradients() == set()
    for cached in (module._of_outputs, module._of_gradients):
        cached.cache_clear()
    assert module._of_outputs()
    assert module._of_gradients()


def test_where_counts_do_not_tell_kept_tensors_apart_nothing_is_alone(monkeypatch):
    for cached in (module._of_outputs, module._of_gradients):
        cached.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_counts", lambda tensor: 1)
        assert module._of_outputs() == module._of_gradients() == set()
    for cached in (module._of_outputs, module._of_gradients):
        cached.cache_clear()
