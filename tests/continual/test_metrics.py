import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.continual.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    mean_and_deviation,
)


def test_a_worked_example():
    accuracy = [[0.9], [0.6, 0.8], [0.7, 0.85, 0.5]]
    assert average_accuracy(accuracy) == pytest.approx((0.7 + 0.85 + 0.5) / 3)
    assert learning_accuracy(accuracy) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    # task 0: best 0.9, now 0.7; task 1: best 0.8, now 0.85, which is an improvement
    assert forgetting(accuracy) == pytest.approx((0.2 - 0.05) / 2)
    assert backward_transfer(accuracy) == pytest.approx((-0.2 + 0.05) / 2)
    assert forward_transfer([0.5, 0.6, 0.3], [0.5, 0.4, 0.35]) == pytest.approx((0.2 - 0.05) / 2)


def test_a_single_task_has_nothing_to_forget_or_transfer():
    assert forgetting([[0.9]]) is backward_transfer([[0.9]]) is forward_transfer([0.5], [0.5]) is None
    assert forward_transfer([], []) is None
    assert average_accuracy([[0.9]]) == learning_accuracy([[0.9]]) == 0.9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_nothing_is_forgotten_when_nothing_changes(final):
    accuracy = [final[: i + 1] for i in range(len(final))]
    assert forgetting(accuracy) == backward_transfer(accuracy) == 0
    assert learning_accuracy(accuracy) == pytest.approx(average_accuracy(accuracy))


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=2, max_size=5))
def test_forgetting_is_at_least_what_was_lost_since_learning(rows):
    accuracy = [row[: i + 1] for i, row in enumerate(rows)]
    assert forgetting(accuracy) >= -backward_transfer(accuracy) - 1e-12


def test_mean_and_deviation():
    assert mean_and_deviation([0.5]) == (0.5, None)
    mean, deviation = mean_and_deviation([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert deviation == pytest.approx((((1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2) / 2) ** 0.5)


@pytest.mark.parametrize("values", [[math.inf, 1.0], [math.nan, 1.0], [math.inf, -math.inf]])
def test_seeds_that_diverged(values):
    mean, deviation = mean_and_deviation(values)
    assert not math.isfinite(mean)
    assert math.isnan(deviation)


@pytest.mark.parametrize("bad", [[], [[]], [[0.5], [0.5]], [[0.5, 0.5]]])
def test_a_matrix_that_is_not_lower_triangular_is_refused(bad):
    with pytest.raises(ValueError, match="lower triangular"):
        average_accuracy(bad)


def test_forward_transfer_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="got 1 accuracies before .* and 2 of the base model"):
        forward_transfer([0.5], [0.5, 0.5])
