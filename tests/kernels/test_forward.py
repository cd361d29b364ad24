import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from curlora.kernels import forward
from tests.kernels.problems import LAYOUTS, assert_near, exact, make, problems, sizes


def check(problem, blocks=None, keep_z=True):
    result, z = forward.launch(*problem.forward, keep_z, blocks)
    expected, expected_z = exact(*problem.forward)
    assert result.is_contiguous()
    assert (result.dtype, z.dtype) == (problem.output.dtype, problem.scaled_U.dtype)
    size, size_z, *_ = sizes(problem)
    assert_near(result, expected, size, problem.output.dtype)
    if keep_z:
        assert_near(z, expected_z, size_z, problem.scaled_U.dtype)


@settings(max_examples=40)
@given(problem=problems())
def test_the_formula(problem):
    check(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [5, 70])
def test_many_tiles_and_parts(layout, r):
    """Several programs handle the same tokens, and each has several tiles of columns."""
    problem = make((3, 13), m=101, r=r, layout=layout)
    check(problem, forward.Blocks(tokens=16, columns=16, tiles=3))


def test_z_is_left_out():
    problem = make((9,), m=20, r=4)
    assert forward.launch(*problem.forward, False)[1].shape == (0, 4)
    check(problem, keep_z=False)


def test_a_zero_U_returns_the_output_bit_for_bit():
    problem = make((9,), m=20, r=4, dtype=torch.bfloat16)
    result, _ = forward.launch(problem.output, torch.zeros(4, 4), *problem.forward[2:], True)
    assert torch.equal(result, problem.output)
    assert result.data_ptr() != problem.output.data_ptr()


@pytest.mark.parametrize("outside", [-1, 20])
def test_an_index_from_outside_gives_no_numbers(outside):
    problem = make((3,), m=20, r=4)
    problem.index[2] = outside
    result, z = forward.launch(*problem.forward, True)
    assert torch.isnan(z[:, 2]).all()
    assert torch.isnan(result).all()


def test_nothing_is_written_to():
    problem = make((2, 9), m=20, r=4, layout="a slice")
    before = [tensor.clone() for tensor in problem.forward]
    forward.launch(*problem.forward, True)
    for tensor, was in zip(problem.forward, before, strict=True):
        assert torch.equal(tensor, was)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("keep_z", [True, False])
def test_the_operator_is_what_it_says(layout, keep_z):
    problem = make((2, 3), m=20, r=4, layout=layout)
    opcheck(torch.ops.curlora.forward.default, (*problem.forward, keep_z))
