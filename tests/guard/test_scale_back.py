"""Scaling a step back until a measure is within its limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curlora.guard import scale_to_limit
from curlora.text.processes import in_all


def step(curve, limit, **options):
    """Scale a step from 0 to 10 back; the measure is ``curve`` of the share of the step."""
    parameter = torch.tensor([10.0])
    seen = []

    def measure():
        seen.append(float(parameter) / 10)
        return curve(float(parameter) / 10)

    scale, found = scale_to_limit(limit, measure, [parameter], [torch.zeros(1)], **options)
    assert float(parameter) / 10 == pytest.approx(scale)  # the parameter is at the returned scale
    assert found == curve(float(parameter) / 10)  # not curve(scale), because rounding matters where a curve jumps
    return scale, found, len(seen)


def test_a_step_within_the_limit_is_left_alone_and_measured_once():
    assert step(lambda t: 0.5 * t, 0.5) == (1.0, 0.5, 1)


@pytest.mark.parametrize("height", [1, 1e2, 1e4])
@pytest.mark.parametrize("power", [1, 2, 3, 5, 6])
def test_most_of_what_is_allowed_is_used(power, height):
    scale, found, measurements = step(lambda t: height * t**power, 0.2)
    assert 0.19 <= found <= 0.2
    assert scale == pytest.approx((found / height) ** (1 / power))
    assert measurements <= 10


def test_the_square_law_takes_one_trial():
    assert step(lambda t: t**2, 0.01)[2] == 3


@pytest.mark.parametrize(("slope", "bend"), [(1, 0), (0.3, 0.7), (-0.3, 1.3), (0.5, 20)])
@pytest.mark.parametrize("limit", [0.01, 0.2])
def test_a_slope_and_a_bend_take_two(slope, bend, limit):
    _, found, measurements = step(lambda t: slope * t + bend * t**2, limit)
    assert 0.95 * limit <= found <= limit
    assert measurements == 4


@settings(max_examples=200)
@given(heights=st.lists(st.floats(0, 3), min_size=5, max_size=30), limit=st.floats(0.05, 1.0))
def test_it_holds_on_any_curve(heights, limit):
    def curve(t):
        return 0.0 if t == 0 else heights[min(int(t * len(heights)), len(heights) - 1)]

    _, found, _ = step(curve, limit)
    assert found <= limit


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_diverged_is_taken_back(broken):
    scale, found, _ = step(lambda t: t if t < 0.3 else broken, 0.2)
    assert 0 < scale <= 0.2
    assert found <= 0.2


def test_what_was_over_before_the_step_is_said():
    scale, found, _ = step(lambda t: 1.0 + t, 0.5)
    assert (scale, found) == (0.0, 1.0)


def test_a_parameter_that_is_not_finite_and_that_the_measure_misses_is_taken_back():
    """Such as an expert that no token of the text reaches."""
    parameter = torch.tensor([math.nan])
    assert scale_to_limit(0.5, lambda: 0.1, [parameter], [torch.ones(1)]) == (0.0, 0.1)
    assert parameter == 1


def test_parameters_that_are_not_finite_are_taken_back_at_once():
    parameters = [torch.tensor([math.nan]), torch.tensor([1.0])]
    seen = []

    def measure():
        seen.append(1)
        return float(sum(parameters))

    assert scale_to_limit(0.5, measure, parameters, [torch.tensor([0.25]), torch.tensor([0.125])]) == (0.0, 0.375)
    assert [float(p) for p in parameters] == [0.25, 0.125]
    assert len(seen) == 2


def test_an_error_while_measuring_loses_nothing():
    U = torch.full((2, 2), 3.0)
    answers = iter([9.0, 0.0])

    def measure():
        return next(answers)  # raises after two

    with pytest.raises(StopIteration):
        scale_to_limit(1.0, measure, [U], [torch.zeros(2, 2)])
    assert (U == 3).all()


def test_a_measure_that_raises_in_one_process_raises_in_all(monkeypatch):
    others = []

    def gather(into, mine):
        into[:] = [mine, *others]

    monkeypatch.setattr("curlora.text.processes.rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    others[:] = [None]
    assert in_all(lambda: 3.0) == 3.0
    with pytest.raises(ZeroDivisionError):
        in_all(lambda: 1 / 0)
    others[:] = ["OSError: away"]
    with pytest.raises(RuntimeError, match="Another process has failed with OSError: away"):
        in_all(lambda: 3.0)
