"""The adapter methods of transformers' models."""

import copy
import json

import pytest
import torch

from curlora import CurloraConfig
from tests.models import curlora, layers, llama, randomize, tokens


def test_add_disable_set_and_delete():
    ids = tokens()
    model = llama()
    plain = model(ids).logits
    model.add_adapter(CurloraConfig(r=4), "first")
    model.add_adapter(CurloraConfig(r=3, seed=1), "second")
    randomize(model, "first")
    randomize(model, "second")
    assert model.active_adapters() == ["second"]
    expected = curlora(llama(), r=3)(ids).logits  # other columns and rows
    assert not torch.allclose(model(ids).logits, expected, atol=1e-4)
    model.set_adapter("first")
    torch.testing.assert_close(model(ids).logits, curlora(llama())(ids).logits)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, plain)
    model.enable_adapters()
    model.delete_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("seed", [0, 99])
@pytest.mark.parametrize("trained", [False, True])
def test_load_adapter_takes_the_columns_of_the_file(seed, trained, tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["digest"] = "changed"
    config["seed"] = seed  # with another seed than the adapter's, the indices of the file must replace the draw
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = llama()
    loaded.load_adapter(str(tmp_path), is_trainable=trained)
    loaded.eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_what_transformers_saves_peft_loads(tmp_path):
    from peft import PeftModel

    model = llama()
    model.add_adapter(CurloraConfig(r=4))
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_load_adapter_refuses_another_base(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter 'default' was made on another base model"):
        llama(seed=1).load_adapter(str(tmp_path))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_load_adapter_refuses_what_was_changed_since_it_was_saved(file, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    changed = (tmp_path / file).read_bytes()
    if file == "adapter_config.json":
        changed = json.dumps({**json.loads(changed), "alpha": 3.0}).encode()
    else:
        changed = changed[:-1] + bytes([changed[-1] ^ 1])
    (tmp_path / file).write_bytes(changed)
    base = llama()
    with pytest.raises(ValueError, match=r"is not the one that was saved|is damaged: its tensors are not those"):
        base.load_adapter(str(tmp_path))
    assert not layers(base)
    assert torch.equal(base(tokens()).logits, llama()(tokens()).logits)


def test_moving_or_copying_a_model_whose_base_was_trained_is_no_load():
    model = curlora(llama())
    for layer in layers(model):
        layer.get_base_layer().weight.data *= 1.5
    before = model(tokens()).logits
    assert torch.equal(copy.deepcopy(model).eval()(tokens()).logits, before)
    torch.testing.assert_close(model.double().eval().float().eval()(tokens()).logits, before)
