"""No tensor that other code can see is changed: outputs and gradients that it keeps, hooks or uses again."""

from functools import partial

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from curlora import CurloraConfig
from curlora.functional import gather_update

TOKENS, M, R = 6, 5, 2
WEIGHT = torch.randn(M, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INDEX = torch.tensor([3, 1])


def adapted(x, U):
    """Apply a frozen linear layer with a CUR update."""
    return gather_update(x @ WEIGHT.T, U, WEIGHT[:, :R].contiguous(), INDEX)


def by_formula(x, U):
    return x @ (WEIGHT + WEIGHT[:, :R] @ U @ WEIGHT[INDEX]).T


def inputs(shape=(TOKENS, M)):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(R, R, generator=rng, dtype=torch.float64, requires_grad=True)


# Each function takes the layer and returns the tensors to compare besides the gradients of the inputs.
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
    """A hook on a node gets the gradient after the node has used it."""
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


def batched(layer, x, U):
    """``torch.autograd.functional.jacobian(vectorize=True)`` computes gradients in this way."""
    y = layer(x * 1, U)
    directions = torch.eye(y.numel(), dtype=y.dtype)[:3].view(3, *y.shape)
    return torch.autograd.grad(y.sin(), [x, U], directions, is_grads_batched=True)


def from_numpy(layer, x, U):
    """A gradient in memory whose references torch does not count."""
    y = layer(x * 1, U)
    array = np.ones(y.shape)
    y.register_hook(lambda gradient: torch.from_numpy(array))
    y.sin().sum().backward()
    return [torch.from_numpy(array)]


def halves_of_one_gradient(layer, x, U):
    torch.cat([layer(x * 1, U), x * 3, layer(x * 2, U)]).sin().sum().backward()


def transposed(layer, x, U):
    layer(x * 1, U).view(2, 3, M).transpose(0, 1).sin().sum().backward()


CASES = [
    residual, residual_other_order, used_twice, kept_by_a_hook, kept_as_a_view, kept_detached, kept_by_the_node,
    kept_before_a_view, retained, asked_for, given, given_in_another_shape, expanded, twice_through_one_graph,
    second_derivatives, checkpointed, checkpointed_reentrant, halves_of_one_gradient, transposed, batched,
    from_numpy,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("shape", [(TOKENS, M), (2, 3, M)], ids=["tokens", "rows of tokens"])
def test_nothing_that_anyone_else_sees_is_changed(case, shape):
    results = []
    for form in (by_formula, adapted):
        x, U = inputs(shape)
        seen = case(form, x, U) or []
        results.append([*seen, x.grad, U.grad])
    for expected, got in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)


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


class Reverses(torch.autograd.Function):
    """A function whose result is a view of its input, with the negative gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def reversed_by_a_hook(base):
    base.register_forward_hook(lambda module, args, output: Reverses.apply(output))


def changed_by_a_backward_hook(base):
    base.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: (grad_inputs[0] * 10,))


def changed_by_a_hook_on_the_output(base):
    base.register_forward_hook(lambda module, args, output: output.register_hook(lambda grad: grad * 10) and None)


def by_autograd(output, scaled_U, factor, index, offset=None):
    z = output[..., index] if offset is None else output[..., index] - offset
    return output + linear(linear(z, scaled_U), factor)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "meddle",
    [reversed_by_a_hook, changed_by_a_backward_hook, changed_by_a_hook_on_the_output],
    ids=lambda f: f.__name__,
)
def test_what_hooks_make_of_gradients_comes_through(base, meddle, monkeypatch):
    gradients = []
    for form in (gather_update, by_autograd):
        monkeypatch.setattr("curlora.tuner.linking_matrix.gather_update", form)
        model, layer, x, _ = layer_and_formula(BASES[base]())
        meddle(layer.base_layer)
        first = model.base_model.model.first.weight.requires_grad_()
        model(x).sin().sum().backward()
        gradients.append(first.grad)
    torch.testing.assert_close(*gradients)


class UnderInference(nn.Linear):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def test_an_output_of_an_inference_mode_that_is_over_is_left_alone():
    model, _, x, expected = layer_and_formula(UnderInference(8, 6))
    torch.testing.assert_close(model(x).detach(), expected)


def test_forward_mode_derivatives_come_through():
    model, _, x, _ = layer_and_formula(nn.Linear(8, 6))
    direction = torch.randn(x.shape)
    with torch.no_grad():
        _, expected = torch.func.jvp(model.base_model.model, (x,), (direction,))
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(got, expected)


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
    """The backward of such a base layer reads its output."""
    gradients = []
    for form in (gather_update, by_autograd):
        x, U = inputs()
        form(KeepsItsOutput.apply(x, WEIGHT), U, WEIGHT[:, :R], INDEX).sin().sum().backward()
        gradients.append([x.grad, U.grad])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def of_a_step(form=lambda step: step()):
    """Return the gradient of a layer's ``U`` after one step."""
    torch.manual_seed(0)
    model, layer, x, _ = layer_and_formula(nn.Linear(8, 6))
    form(lambda: checkpoint(model, x, use_reentrant=False).sin().sum()).backward()
    return layer.curlora_U["default"].weight.grad


def keeping_what_is_saved(step):
    with torch.autograd.graph.save_on_cpu():
        return step()


def selectively(step):
    """The forward pass caches products for the recomputation."""
    return checkpoint(step, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS))


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


@pytest.mark.parametrize("form", [keeping_what_is_saved, selectively], ids=lambda form: form.__name__)
def test_a_step_under_checkpointing_in_checkpointing(form):
    torch.testing.assert_close(of_a_step(form), of_a_step())
