"""Adapters that were saved in version 1 of the format still load, with the same outputs."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tuner.saved_before.models import INPUTS, conv1d, linear

SAVED = Path(__file__).parent / "saved_before"
OUTPUTS = load_file(SAVED / "outputs.safetensors")
BASES = {"linear": linear, "conv1d": conv1d, "shared": linear}


def loaded(kind, low_memory=False):
    return PeftModel.from_pretrained(BASES[kind](), SAVED / kind, low_cpu_mem_usage=low_memory).eval()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_they_load(kind, low_memory):
    torch.testing.assert_close(loaded(kind, low_memory)(INPUTS), OUTPUTS[kind])


def test_two_that_were_drawn_alike_share_a_basis():
    model = loaded("shared")
    model.load_adapter(SAVED / "shared" / "second", "second")
    layer = model.base_model.model.first
    assert layer.basis("second") is layer.basis("default")
    model.set_adapter("second")
    torch.testing.assert_close(model(INPUTS), OUTPUTS["shared/second"])


def test_one_is_swapped_in():
    model = loaded("shared")
    hotswap_adapter(model, str(SAVED / "shared" / "second"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(model(INPUTS), OUTPUTS["shared/second"])


@pytest.mark.parametrize("kind", BASES)
def test_saved_again_they_are_of_the_present_version(kind, tmp_path):
    loaded(kind).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["curlora_format"] == "2"
        keys = file.keys()
        assert {key.rpartition("curlora_U.")[2] for key in keys} == {"weight", "indices", "fingerprint"}
    again = PeftModel.from_pretrained(BASES[kind](), tmp_path).eval()
    torch.testing.assert_close(again(INPUTS), OUTPUTS[kind])
