import pytest
import torch
import triton
from hypothesis import given, settings
from torch.library import opcheck

from curlora.kernels import backward
from curlora.kernels.tiles import chunk, padded
from tests.kernels.problems import LAYOUTS, assert_near, exact_gradients, make, problems, sizes


def check(problem, blocks=None):
    of_output, of_U = backward.launch(*problem.backward, True, blocks)
    expected, expected_U = exact_gradients(*problem.backward)
    assert of_output.is_contiguous()
    assert (of_output.dtype, of_U.dtype) == (problem.grad.dtype, problem.scaled_U.dtype)
    *_, size, size_U = sizes(problem)
    # Ranks with the same column are summed before they are added to it, but only within the ranks loaded at once.
    roundings = 3 + triton.cdiv(len(problem.index), chunk(padded(len(problem.index))))
    assert_near(of_output, expected, size, problem.grad.dtype, problem.scaled_U.dtype, roundings=roundings)
    assert_near(of_U, expected_U, size_U, problem.scaled_U.dtype)


@settings(max_examples=40)
@given(problem=problems())
def test_the_formula(problem):
    check(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [5, 70])
def test_many_programs_and_tiles(layout, r):
    problem = make((3, 31), m=101, r=r, layout=layout)
    check(problem, backward.Blocks(tokens=16, columns=16))


def test_a_gradient_that_is_one_number():
    """``sum()`` has such a gradient, in which every stride is zero."""
    problem = make((3, 7), m=20, r=4)
    problem.grad = torch.ones(()).expand(3, 7, 20)
    check(problem)


def test_one_column_is_all_that_is_gathered():
    """The duplicates are within the ranks that are loaded at once, and across them."""
    problem = make((7,), m=20, r=100)
    problem.index.fill_(3)
    check(problem)


def test_what_is_not_needed_is_left_out():
    problem = make((7,), m=20, r=4)
    grad, z, *rest = problem.backward
    of_output, of_U = exact_gradients(*problem.backward)
    got, none = backward.launch(grad, None, *rest, True)
    *_, size, size_U = sizes(problem)
    assert_near(got, of_output, size, torch.float32)
    assert none.numel() == 0
    none, got = backward.launch(grad, z, *rest, False)
    assert_near(got, of_U, size_U, torch.float32)
    assert none.numel() == 0


@pytest.mark.parametrize("r", [4, 70])
def test_sums_over_tokens_are_float32_and_the_same_in_every_run(r):
    """With many tokens, a sum in half precision would stop growing."""
    problem = make((300,), m=20, r=r, dtype=torch.bfloat16)
    problem.grad.abs_()
    problem.z.abs_()
    blocks = backward.Blocks(tokens=16, columns=32)
    first, again = (backward.launch(*problem.backward, True, blocks) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert_near(first[1], exact_gradients(*problem.backward)[1], sizes(problem)[-1], torch.float32)


def test_the_gradient_that_is_given_is_not_written_to():
    """Other code may use the same tensor."""
    problem = make((2, 9), m=20, r=4, layout="a slice")
    before = [tensor.clone() for tensor in problem.backward]
    backward.launch(*problem.backward, True)
    for tensor, was in zip(problem.backward, before, strict=True):
        assert torch.equal(tensor, was)


@pytest.mark.parametrize("need_output", [True, False])
@pytest.mark.parametrize("need_U", [True, False])
def test_the_operator_is_what_it_says(need_output, need_U):
    grad, z, *rest = make((2, 3), m=20, r=4, layout="transposed").backward
    opcheck(torch.ops.curlora.backward.default, (grad, z if need_U else None, *rest, need_output))
