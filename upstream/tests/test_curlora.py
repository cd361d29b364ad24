# SPDX-License-Identifier: Apache-2.0
"""CURLoRA by PEFT's own calls alone. What PEFT tests for every method belongs into its matrices; docs/upstream.md."""

import pytest
import torch
from peft import CurloraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.curlora import CurloraLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, X):
        return self.lin1(self.lin0(X.float()).relu())


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP()


def config(**options):
    return CurloraConfig(**{"r": 2, "target_modules": ["lin0", "lin1"], **options})


def trained(model, steps=3):
    X, y = torch.randn(8, 10, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model.eval()


X = torch.arange(90).view(9, 10)


class TestCurlora:
    def test_is_registered(self):
        assert config().peft_type == PeftType.CURLORA

    def test_starts_as_the_base_model(self):
        assert torch.equal(get_peft_model(mlp(), config())(X), mlp()(X))

    def test_trains_r_times_r_parameters_per_layer(self):
        model = get_peft_model(mlp(), config())
        assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 2

    def test_update_is_the_formula(self):
        model = trained(get_peft_model(mlp(), config()))
        layer = model.base_model.model.lin0
        W, U = layer.weight.double(), layer.curlora_U["default"]
        assert isinstance(layer, CurloraLayer)
        assert U.weight.abs().max() > 0
        columns, rows = U.indices
        expected = W[:, columns] @ U.weight.double() @ W[rows]
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected)

    def test_saves_and_loads(self, tmp_path):
        model = trained(get_peft_model(mlp(), config()))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(mlp(), tmp_path).eval()
        assert torch.equal(again(X), model(X))

    def test_another_base_is_refused(self, tmp_path):
        trained(get_peft_model(mlp(), config())).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(mlp(seed=1), tmp_path)

    def test_merges_and_unmerges(self):
        model = trained(get_peft_model(mlp(), config()))
        expected, weight = model(X), model.base_model.model.lin0.weight.clone()
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected)
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.lin0.weight, weight)
        torch.testing.assert_close(model.merge_and_unload()(X), expected)

    def test_disabled_it_is_the_base_model(self):
        model = trained(get_peft_model(mlp(), config()))
        with model.disable_adapter():
            assert torch.equal(model(X), mlp()(X))

    def test_default_targets_of_a_language_model(self):
        base = LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = get_peft_model(AutoModelForCausalLM.from_config(base), CurloraConfig(r=2))
        adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, CurloraLayer)}
        assert adapted == {"q_proj", "k_proj", "v_proj"}
