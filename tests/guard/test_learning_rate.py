"""The rule for the learning rate: its values where it was fitted, and its errors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.guard import GuardError, learning_rate


def test_it_is_the_formula_of_the_page():
    assert learning_rate(0.01, 60, 32) == pytest.approx(0.1)
    assert learning_rate(0.04, 960, 128) == pytest.approx(0.1 / 2 / 2 / 2)
    assert learning_rate(5.0, 60, 32) == learning_rate(0.1, 60, 32) == pytest.approx(0.1 / math.sqrt(10))
    assert learning_rate(1e-6, 60, 32) == pytest.approx(0.003)


@given(st.floats(1e-8, 100), st.integers(1, 10**7), st.integers(1, 4096))
def test_more_steps_and_a_wider_adapter_never_ask_for_a_higher_rate(budget, steps, r):
    rate = learning_rate(budget, steps, r)
    assert 0 < rate <= 3 * math.sqrt(budget) * (1 + 1e-12)
    assert learning_rate(budget, 2 * steps, r) <= rate
    assert learning_rate(budget, steps, 2 * r) <= rate


@pytest.mark.parametrize(
    "wrong", [(0.0, 60, 32), (math.nan, 60, 32), (math.inf, 60, 32), (0.01, 0, 32), (0.01, 60, -1)]
)
def test_what_is_not_positive_is_refused(wrong):
    with pytest.raises(GuardError, match="must be positive, got"):
        learning_rate(*wrong)
