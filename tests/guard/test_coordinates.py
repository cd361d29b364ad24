"""The guard's coordinates against dense float64 formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curlora.guard.coordinates import coordinates


def moment(r, rank, seed, scale=1.0):
    rows = torch.randn(rank, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * rows.T @ rows / rank


@settings(max_examples=50)
@given(
    r=st.integers(1, 12), rank=st.integers(1, 30), seed=st.integers(0, 999), scale=st.sampled_from([1e-12, 1.0, 1e9])
)
def test_the_squared_length_of_v_is_the_damped_quadratic_form(r, rank, seed, scale):
    A, S = moment(r, rank, seed, scale), moment(r, rank, seed + 1)
    V = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = coordinates(A, S, damping=0.1)
    M = place.left @ V @ place.right
    damped_A = A + 0.1 * A.trace() / r * torch.eye(r)
    damped_S = S + 0.1 * S.trace() / r * torch.eye(r)
    torch.testing.assert_close((M.T @ damped_A @ M @ damped_S).trace(), V.square().sum(), rtol=1e-7, atol=0)
    torch.testing.assert_close(place.left_inverse @ M @ place.right_inverse, V, rtol=1e-6, atol=1e-7)


def test_repeated_columns_cost_what_the_damping_says():
    """Two equal columns make ``A`` singular; the coordinates stay finite."""
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    place = coordinates(A, torch.eye(2, dtype=torch.float64), damping=1e-3)
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    length = difference / difference.norm()
    assert length @ place.left @ length == pytest.approx(1e-3**-0.5)


def test_a_text_that_does_not_use_a_layer_gives_no_coordinates():
    zero, one = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert coordinates(zero, one, 0.1) is None
    assert coordinates(one, zero, 0.1) is None
