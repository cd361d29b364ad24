import pytest
from hypothesis import given
from hypothesis import strategies as st

from curlora.continual.metrics import average_accuracy, forgetting


def test_a_worked_example():
    accuracy = [[0.9], [0.6, 0.8], [0.7, 0.85, 0.5]]
    assert average_accuracy(accuracy) == pytest.approx((0.7 + 0.85 + 0.5) / 3)
    # task 0: best 0.9, now 0.7; task 1: best 0.8, now 0.85, which helped
    assert forgetting(accuracy) == pytest.approx((0.2 - 0.05) / 2)


def test_a_single_task_has_nothing_to_forget():
    assert forgetting([[0.9]]) is None
    assert average_accuracy([[0.9]]) == 0.9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_nothing_is_forgotten_when_nothing_changes(final):
    accuracy = [final[: i + 1] for i in range(len(final))]
    assert forgetting(accuracy) == 0


@pytest.mark.parametrize("bad", [[], [[]], [[0.5], [0.5]], [[0.5, 0.5]]])
def test_a_matrix_that_is_not_lower_triangular_is_refused(bad):
    with pytest.raises(ValueError, match="lower triangular"):
        average_accuracy(bad)
