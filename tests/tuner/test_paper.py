"""The paper's counts of trained parameters, on its architectures, without their weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from curlora import CurloraConfig

# Section 5: GPT-2 Large adapts c_attn, Mistral 7B the query, key and value projections.
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
MISTRAL_7B = MistralConfig(vocab_size=32768, sliding_window=None)  # the defaults are Mistral 7B's sizes


def on_meta(config, adapter):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    return get_peft_model(base, adapter)


@pytest.mark.parametrize(
    ("config", "adapter", "trained"),
    [
        (GPT2_LARGE, CurloraConfig(r=8), 2_304),
        (GPT2_LARGE, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True), 1_474_560),
        (MISTRAL_7B, CurloraConfig(r=16), 24_576),
        (MISTRAL_7B, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]), 9_437_184),
    ],
)
def test_trained_numbers(config, adapter, trained):
    assert on_meta(config, adapter).get_nb_trainable_parameters()[0] == trained


def test_mistral_7b_has_as_many_parameters_as_the_paper_says():
    model = on_meta(MISTRAL_7B, CurloraConfig(r=16))
    assert sum(p.numel() for n, p in model.named_parameters() if "curlora_" not in n) == 7_248_023_552


def test_a_mistral_7b_adapter_stays_under_150_kib(tmp_path):
    state = get_peft_model_state_dict(on_meta(MISTRAL_7B, CurloraConfig(r=16)), save_embedding_layers=False)
    values = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}
    save_file(values, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 24_576 * 4 < size <= 150 * 1024
