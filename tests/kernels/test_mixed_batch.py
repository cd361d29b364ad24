import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from curlora.kernels import forward, mixed_batch
from tests.kernels.problems import LAYOUTS, assert_near, exact, make, problems, sizes


def check(problem, blocks=None):
    result = mixed_batch.launch(*problem.forward, blocks)
    assert result.is_contiguous()
    assert result.dtype == problem.output.dtype
    assert_near(result, exact(*problem.forward)[0], sizes(problem)[0], problem.output.dtype)


@settings(max_examples=25)
@given(problem=problems(rows=True))
def test_the_formula(problem):
    check(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [5, 70])
def test_many_tiles_and_parts(layout, r):
    problem = make((3, 19), m=101, r=r, layout=layout, rows=3)
    check(problem, forward.Blocks(tokens=16, columns=16, tiles=3))


def test_rows_that_share_one_matrix():
    problem = make((3, 5), m=20, r=4, rows=3)
    problem.scaled_U = problem.scaled_U[:1].expand(3, 4, 4)
    check(problem)


def test_the_operator_is_what_it_says():
    opcheck(torch.ops.curlora.mixed_batch.default, make((3, 5), m=20, r=4, rows=3).forward)
