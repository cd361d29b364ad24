"""The gather form against the dense float64 formula ``W + alpha C U R`` and against gradcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curlora.functional import gather_update


def make_problem(m=7, n=5, r=3, lead=(4,), bias=True, duplicates=True, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    rows = torch.randint(0, m, (r,), generator=rng)
    columns = torch.randint(0, n, (r,), generator=rng)
    if duplicates and r > 1:
        rows[1], columns[1] = rows[0], columns[0]
    W, b, U, x = normal(m, n), normal(m) if bias else None, normal(r, r), normal(*lead, n)
    return dict(W=W, b=b, U=U, x=x, rows=rows, columns=columns)


def dense(W, b, U, x, rows, columns, alpha=1.0):
    return nn.functional.linear(x, W + alpha * W[:, columns] @ U @ W[rows], b)


def fast(W, b, U, x, rows, columns, alpha=1.0):
    output = nn.functional.linear(x, W, b)
    offset = None if b is None else b[rows]
    return gather_update(output, alpha * U, W[:, columns].detach(), rows.int(), offset)


@settings(max_examples=60)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    r=st.integers(1, 5),
    lead=st.sampled_from([(1,), (3,), (2, 3), (2, 1, 3), (), (5, 8)]),
    bias=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    seed=st.integers(0, 10**6),
)
def test_forward_and_gradients_match_the_dense_formula(m, n, r, lead, bias, alpha, seed):
    problem = make_problem(m, n, r, lead, bias, seed=seed)
    results = []
    for form in (dense, fast):
        leaves = {k: v.clone().requires_grad_() for k, v in problem.items() if k in ("U", "x", "b") and v is not None}
        y = form(**{**problem, **leaves}, alpha=alpha)
        grads = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), list(leaves.values()))
        results.append([y, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_first_and_second_order(bias):
    problem = make_problem(bias=bias)
    factor = problem["W"][:, problem["columns"]]
    rows = problem["rows"].int()
    output = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    scaled_U = problem["U"].clone().requires_grad_()
    offset = problem["b"][problem["rows"]].clone().requires_grad_() if bias else None

    def f(output, scaled_U, offset=None):
        return gather_update(output, scaled_U, factor, rows, offset)

    inputs = (output, scaled_U) if offset is None else (output, scaled_U, offset)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    exact = make_problem(64, 48, 8, (16,), dtype=torch.float64)
    exact["U"] *= 0.1
    low = {k: v.to(dtype) if v.dtype == torch.float64 else v for k, v in exact.items()}
    low["U"] = exact["U"].float()
    got, expected = fast(**low), dense(**exact)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() / expected.norm() < tolerance


def test_a_zero_U_returns_the_output_bit_for_bit():
    problem = make_problem(64, 48, 8, (5, 16), dtype=torch.float32)
    output = nn.functional.linear(problem["x"], problem["W"], problem["b"])
    got = gather_update(output, torch.zeros(8, 8), problem["W"][:, problem["columns"]], problem["rows"])
    assert torch.equal(got, output)
    assert got is not output


def test_saves_z_and_nothing_else_of_the_tokens():
    tokens, n, m, r = 100, 40, 30, 4
    layer = nn.Linear(n, m).requires_grad_(False)
    U = torch.zeros(r, r, requires_grad=True)
    factor, rows = layer.weight[:, :r].clone(), torch.arange(r, dtype=torch.int32)
    x = torch.randn(tokens, n, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gather_update(layer(x), U, factor, rows, layer.bias[rows])
    y.sum().backward()
    own = {layer.weight.data_ptr(), U.data_ptr(), factor.data_ptr(), rows.data_ptr()}
    fresh = [t for t in saved if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in fresh] == [(tokens, r)]


def test_saves_nothing_of_the_tokens_when_only_the_input_needs_a_gradient():
    layer = nn.Linear(40, 30).requires_grad_(False)
    factor, rows = layer.weight[:, :4].clone(), torch.arange(4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gather_update(layer(torch.randn(100, 40, requires_grad=True)), torch.zeros(4, 4), factor, rows)
    assert all(t.shape[0] != 100 for t in saved)


@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_forward_mode_derivatives(lead):
    problem = make_problem(lead=lead)
    W, U, rows = problem["W"], problem["U"], problem["rows"]
    factor = W[:, problem["columns"]]
    y0, dy0 = torch.randn(2, *lead, 7, dtype=torch.float64)
    _, got = torch.func.jvp(lambda y: gather_update(y, U, factor, rows), (y0,), (dy0,))
    torch.testing.assert_close(got, dy0 + dy0[..., rows] @ U.T @ factor.T)


@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_the_result_can_be_changed_in_place(lead):
    problem = make_problem(lead=lead)
    U = problem["U"].requires_grad_()
    expected = torch.autograd.grad(dense(**problem).relu().sum(), U)[0]
    got = torch.autograd.grad(nn.functional.relu(fast(**problem), inplace=True).sum(), U)[0]
    torch.testing.assert_close(got, expected)


def test_an_empty_batch():
    problem = make_problem(lead=(0,))
    assert fast(**problem).shape == (0, 7)


@pytest.mark.parametrize("bad", ["scaled_U", "factor"])
def test_shapes_that_do_not_fit_are_named(bad):
    arguments = dict(output=torch.zeros(2, 7), scaled_U=torch.zeros(3, 3), factor=torch.zeros(7, 3))
    arguments[bad] = torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"\(2, 7\).*index of length 3.*\(5, 2\)"):
        gather_update(**arguments, index=torch.tensor([0, 1, 1]))


def test_the_factor_is_a_constant():
    problem = make_problem()
    factor = problem["W"][:, problem["columns"]].requires_grad_()
    output = torch.ones(2, 7, dtype=torch.float64)
    assert not gather_update(output, problem["U"], factor, problem["rows"]).requires_grad
