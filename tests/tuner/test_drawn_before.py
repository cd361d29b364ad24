"""Weights are read in full only where columns and rows have to be drawn."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from curlora import CurloraConfig
from curlora.tuner import weight as module
from tests.models import BASES, curlora, layers, llama, tokens

both = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def read_in_full(monkeypatch):
    """A list with one entry for each weight that is read in full."""
    reads = []
    norms = module.squared_norms
    monkeypatch.setattr(module, "squared_norms", lambda weight: reads.append(1) or norms(weight))
    return reads


def indices(model, adapter="default"):
    return [layer.basis(adapter).indices for layer in layers(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@both
@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_reads_no_weight_in_full(base, low_memory, tmp_path, read_in_full):
    model = curlora(BASES[base]())
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    other = curlora(BASES[base](), r=3)
    read_in_full.clear()
    loaded = PeftModel.from_pretrained(BASES[base](), tmp_path, low_cpu_mem_usage=low_memory).eval()
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    assert not read_in_full
    assert torch.equal(loaded(tokens()).logits, expected)
    assert torch.equal(other(tokens()).logits, expected)


def test_a_configuration_that_was_read_gives_the_saved_columns_and_rows(tmp_path):
    model = curlora(llama())
    for layer in layers(model):
        torch.nn.init.zeros_(layer.curlora_U["default"].weight)
        layer.redraw("default", torch.arange(8).view(2, 4))
    model.save_pretrained(tmp_path)
    again = get_peft_model(llama(), CurloraConfig.from_pretrained(tmp_path))
    assert same(indices(again), indices(model))


@pytest.mark.parametrize("change", ["seed", "r", "base", "gone", "damaged"])
def test_what_differs_from_the_saved_adapter_is_drawn(change, tmp_path):
    model = curlora(llama())
    for layer in layers(model):
        torch.nn.init.zeros_(layer.curlora_U["default"].weight)
        layer.redraw("default", torch.arange(8).view(2, 4))
    model.save_pretrained(tmp_path)
    config = CurloraConfig.from_pretrained(tmp_path)
    expected = CurloraConfig(r=4)
    if change == "seed":
        config.seed = expected.seed = 5
    if change == "r":
        config.r = expected.r = 3
    file = tmp_path / "adapter_model.safetensors"
    if change == "gone":
        file.unlink()
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    base = llama(seed=1 if change == "base" else 0)
    fresh = get_peft_model(llama(seed=1 if change == "base" else 0), expected)
    assert same(indices(get_peft_model(base, config)), indices(fresh))


@both
def test_adapters_that_are_drawn_alike_read_a_weight_once(base, read_in_full):
    model = curlora(BASES[base]())
    read_in_full.clear()
    for name in ("second", "third"):
        model.add_adapter(name, CurloraConfig(r=4))
        assert same(indices(model, name), indices(model))
    assert not read_in_full
    assert len({id(layers(model)[0].basis(name).factor) for name in ("default", "second", "third")}) == 1


@pytest.mark.parametrize("change", ["seed", "r", "sampling", "weight", "data", "other weight"])
def test_what_is_drawn_otherwise_is_drawn_anew(change):
    model = curlora(llama())
    config = CurloraConfig(r=4)
    if change == "seed":
        config.seed = 5
    if change == "r":
        config.r = 3
    if change == "sampling":
        config.sampling = "norm"
    plain = llama()
    for layer in layers(model):
        for linear in (layer.get_base_layer(), plain.get_submodule(layer.name)):
            changed = linear.weight.detach() * torch.linspace(0.1, 10, linear.weight.shape[1])
            with torch.no_grad():
                if change == "weight":
                    linear.weight.copy_(changed)
                if change == "data":  # autograd does not notice this change
                    linear.weight.data.copy_(changed)
                if change == "other weight":
                    linear.weight = torch.nn.Parameter(changed, requires_grad=False)
    model.add_adapter("second", config)
    assert same(indices(model, "second"), indices(get_peft_model(plain, config)))
