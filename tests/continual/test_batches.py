"""The order of rows in batches."""

from hypothesis import given
from hypothesis import strategies as st

from curlora.continual.batches import LengthGrouped

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


@given(lengths, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40), st.integers(0, 3), st.booleans())
def test_every_row_comes_once_and_fillers_come_last(lengths, batch_size, batches, seed, fillers, fixed):
    sampler = LengthGrouped(lengths, batch_size, seed, batches, fixed=fixed, fillers=fillers)
    order = epoch(sampler, 1)
    assert sorted(order[: len(lengths)]) == list(range(len(lengths)))
    assert order[len(lengths) :] == list(range(len(lengths), len(lengths) + fillers))
    assert len(sampler) == len(order)
    assert epoch(LengthGrouped(lengths, batch_size, seed, batches, fixed=fixed, fillers=fillers), 1) == order


@given(lengths, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40))
def test_fixed_batches_are_the_same_in_all_epochs_and_seeds(lengths, batch_size, batches, seed):
    def made(seed, number):
        order = epoch(LengthGrouped(lengths, batch_size, seed, batches, fixed=True), number)
        return [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]

    first, other = made(seed, 0), made(seed + 1, 3)
    assert set(first) == set(other)
    assert len({len(batch) for batch in first[:-1]}) <= 1


def test_fixed_batches_come_in_other_orders():
    sampler = LengthGrouped([5] * 64, 4, 0, fixed=True)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert first != second
    assert first != epoch(LengthGrouped([5] * 64, 4, 1, fixed=True), 0)
