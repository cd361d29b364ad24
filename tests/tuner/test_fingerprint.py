import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curlora.tuner.fingerprint import compare, compare_layers, fingerprint


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


def test_one_layer_may_be_rounded_more_than_most():
    """In 4-bit quantization several columns share a scale: a column of low norm beside large ones is rounded most."""

    def pair(noise, seed):
        factor = make_factor(seed, r=2)
        rounded = factor + noise * factor.std() * torch.randn(factor.shape, generator=torch.Generator().manual_seed(99))
        return fingerprint(factor), fingerprint(rounded, exact=False)

    layers = {f"layer {seed}": pair(0.25 if seed == 3 else 0.1, seed) for seed in range(9)}
    assert set(compare_layers(layers).values()) == {"precision"}
    alone = {"layer 3": layers["layer 3"]}
    assert compare_layers(alone) == {"layer 3": "other"}  # no other layer shows that it is only rounded


def test_another_base_is_another_whatever_single_layers_say():
    """Some layers of unrelated weights are similar by chance, and each alone would pass. The median does not."""
    pairs = {f"{seed}": (fingerprint(make_factor(seed)), fingerprint(make_factor(10**6 + seed), exact=False))
             for seed in range(400)}  # fmt: skip
    assert "precision" in {compare(*pair) for pair in pairs.values()}
    assert set(compare_layers(pairs).values()) == {"other"}


def test_upcasting_a_half_precision_checkpoint_is_no_change():
    half = make_factor().to(torch.bfloat16)
    assert compare(fingerprint(half), fingerprint(half.float())) == "same"


def test_the_order_of_the_columns_counts():
    factor = make_factor()
    assert compare(fingerprint(factor), fingerprint(factor.flip(1))) == "other"


def test_files_of_today_will_be_read_tomorrow():
    """The bits must never change: otherwise every adapter that was saved before would be refused."""
    factor = torch.arange(12, dtype=torch.float32).view(4, 3)
    assert fingerprint(factor).tolist() == [1, 1103101952, -1061158912, 0, 1094713344, 1103101952, 1099956224, 0]
