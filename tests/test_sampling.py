"""Draws against the paper's formulas and against statistical tests that can fail."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curlora.sampling import SAMPLINGS, draw, probabilities, select, squared_norms


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_papers_worked_example():
    """Section 4.2: column norms 2, 3, 5 give 4/38, 9/38, 25/38."""
    weight = torch.diag(torch.tensor([2.0, 3.0, 5.0]))
    columns, rows = squared_norms(weight)
    expected = torch.tensor([4 / 38, 9 / 38, 25 / 38], dtype=torch.float64)
    torch.testing.assert_close(probabilities(columns, "norm"), expected)
    torch.testing.assert_close(probabilities(rows, "norm"), expected)


def test_inverse_probabilities_are_equation_4():
    p = torch.tensor([4 / 38, 9 / 38, 25 / 38], dtype=torch.float64)
    torch.testing.assert_close(probabilities(p * 38, "inverse"), (1 / p) / (1 / p).sum())


def test_reference_probabilities_are_the_authors_code():
    p = torch.tensor([4 / 38, 9 / 38, 25 / 38], dtype=torch.float64)
    expected = (1 / (p + 0.001)) / (1 / (p + 0.001)).sum()
    torch.testing.assert_close(probabilities(p * 38, "reference"), expected)


@given(
    st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=40),
    st.sampled_from(SAMPLINGS),
)
def test_probabilities_sum_to_one_over_any_scale(norms, sampling):
    p = probabilities(torch.tensor(norms, dtype=torch.float64), sampling)
    assert torch.isfinite(p).all()
    assert (p >= 0).all()
    assert abs(float(p.sum()) - 1) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_squared_norms_match_float64_and_leave_the_weight_alone(dtype):
    weight = torch.randn(300, 70, generator=generator()).to(dtype) * 200  # squares overflow float16
    before = weight.clone()
    columns, rows = squared_norms(weight)
    assert torch.equal(weight, before)
    torch.testing.assert_close(columns, weight.double().square().sum(0))
    torch.testing.assert_close(rows, weight.double().square().sum(1))


def test_squared_norms_in_chunks(monkeypatch):
    weight = torch.randn(37, 11, generator=generator())
    whole = squared_norms(weight)
    monkeypatch.setattr("curlora.sampling._CHUNK_ELEMENTS", 40)
    for a, b in zip(squared_norms(weight), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_follow_the_inverted_distribution(replacement):
    """Pearson's chi-squared on 20,000 single draws; 4 degrees of freedom, so 23.5 has p = 1e-4."""
    p = probabilities(torch.tensor([4.0, 9.0, 25.0, 1.0, 60.0]), "inverse")
    trials = 20_000
    rng = generator(1)
    counts = torch.bincount(torch.cat([draw(p, 1, rng, replacement) for _ in range(trials)]), minlength=5)
    chi_squared = float(((counts - trials * p) ** 2 / (trials * p)).sum())
    assert chi_squared < 23.5
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert float(((counts - trials * uniform) ** 2 / (trials * uniform)).sum()) > 1000  # the test can reject


def test_pairs_without_replacement_are_successive_draws():
    """P(i then j) = p_i p_j / (1 - p_i); 12 ordered pairs, 11 degrees of freedom, p = 1e-4 at 37.4."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    trials = 20_000
    rng = generator(2)
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(trials):
        i, j = draw(p, 2, rng)
        counts[i, j] += 1
    expected = p[:, None] * p[None, :] / (1 - p[:, None]) * trials
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert counts.diagonal().sum() == 0
    assert float(((counts - expected) ** 2 / expected)[off_diagonal].sum()) < 37.4


@given(st.integers(1, 30), st.data())
def test_draws_without_replacement_are_distinct_and_never_zero(n, data):
    norms = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 1e-30, 7.0]), min_size=n, max_size=n)))
    usable = int((norms > 0).sum())
    if usable == 0:
        return
    r = data.draw(st.integers(1, usable))
    drawn = draw(probabilities(norms), r, generator(data.draw(st.integers(0, 2**31))))
    assert len(set(drawn.tolist())) == r
    assert (norms[drawn] > 0).all()


def test_replacement_draws_duplicates_and_skips_zeros():
    p = probabilities(torch.tensor([0.0, 1.0, 2.0, 0.0]))
    drawn = draw(p, 50, generator(), replacement=True)
    assert set(drawn.tolist()) == {1, 2}


def test_zero_columns_are_drawn_only_by_the_reference_rule():
    weight = torch.ones(6, 8)
    weight[:, 3] = 0
    assert probabilities(squared_norms(weight)[0], "uniform")[3] == 0
    assert probabilities(squared_norms(weight)[0], "reference")[3] > 0
    columns, _ = select(squared_norms(weight), 6)
    assert 3 not in columns


def test_select_depends_on_seed_name_and_weight_only():
    weight = torch.randn(40, 30, generator=generator())
    torch.manual_seed(1)
    first = select(squared_norms(weight), 8, seed=5, name="a")
    select(squared_norms(weight), 8, seed=5, name="b")
    torch.manual_seed(99)
    again = select(squared_norms(weight), 8, seed=5, name="a")
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for other in (dict(seed=6, name="a"), dict(seed=5, name="b")):
        assert not torch.equal(first[0], select(squared_norms(weight), 8, **other)[0])
    before = torch.random.get_rng_state()
    select(squared_norms(weight), 8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_select_is_the_same_in_another_process():
    code = (
        "import torch; from curlora.sampling import select, squared_norms;"
        "norms = squared_norms(torch.arange(1., 241.).view(20, 12));"
        "print([t.tolist() for t in select(norms, 5, seed=3, name='layer')])"
    )
    weight = torch.arange(1.0, 241.0).view(20, 12)
    here = str([t.tolist() for t in select(squared_norms(weight), 5, seed=3, name="layer")])
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize("r", [0, 5, 100])
def test_rank_outside_the_matrix_is_refused(r):
    with pytest.raises(ValueError, match=rf"h\.0\.mlp.*\(4, 9\).*r={r} is not between 1 and 4"):
        select(squared_norms(torch.ones(4, 9)), r, name="h.0.mlp")


def test_too_few_nonzero_columns_is_refused():
    weight = torch.zeros(5, 6)
    weight[:, :2] = 1
    with pytest.raises(ValueError, match="columns: cannot draw 3 different positions: only 2 of 6"):
        select(squared_norms(weight), 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    weight = torch.ones(5, 6)
    weight[2, 2] = bad
    with pytest.raises(ValueError, match="'q_proj'.*NaN or infinite"):
        select(squared_norms(weight), 2, name="q_proj")


def test_an_all_zero_weight_is_refused():
    with pytest.raises(ValueError, match="all zeros"):
        select(squared_norms(torch.zeros(4, 4)), 2)


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match=r"'inverse', 'uniform', 'norm', 'reference'.*got 'leverage'"):
        select(squared_norms(torch.ones(4, 4)), 2, sampling="leverage")
