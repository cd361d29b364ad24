import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curlora.tuner.fingerprint import compare, fingerprint


def make_factor(seed=0, m=300, r=8):
    return torch.randn(m, r, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_the_same_weights_are_the_same():
    assert compare(fingerprint(make_factor()), fingerprint(make_factor())) == "same"


@given(st.integers(1, 10**6))
def test_another_model_is_another(seed):
    assert compare(fingerprint(make_factor()), fingerprint(make_factor(seed))) == "other"


def test_a_merged_or_further_trained_base_is_another():
    factor = make_factor()
    assert compare(fingerprint(factor), fingerprint(factor + 1e-3 * make_factor(1))) == "other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_recognized(dtype):
    verdict = compare(fingerprint(make_factor()), fingerprint(make_factor().to(dtype)))
    assert verdict == ("same" if dtype == torch.float64 else "precision")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_is_recognized(bits):
    factor = make_factor()
    step = factor.abs().amax(0) / (2 ** (bits - 1) - 1)
    rounded = ((factor / step).round() * step).to(torch.bfloat16)
    assert compare(fingerprint(factor), fingerprint(rounded)) == "precision"


def test_upcasting_a_half_precision_checkpoint_is_no_change():
    half = make_factor().to(torch.bfloat16)
    assert compare(fingerprint(half), fingerprint(half.float())) == "same"


def test_the_order_of_the_columns_counts():
    factor = make_factor()
    assert compare(fingerprint(factor), fingerprint(factor.flip(1))) == "other"


def test_files_of_today_will_be_read_tomorrow():
    """The very bits: a change here would refuse every adapter saved before it."""
    factor = torch.arange(12, dtype=torch.float32).view(4, 3)
    assert fingerprint(factor).tolist() == [1, 1103101952, -1061158912, 0, 1094713344, 1103101952, 1099956224, 0]
