"""Loading reads the columns of the loaded adapters, and of no others."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from curlora import CurloraConfig
from curlora.tuner import weight as module
from tests.models import BASES, curlora, layers, llama, tokens, word_tokenizer

both = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def taken(monkeypatch):
    """A list with one entry for each time that columns, or rows in their place, are read from a weight."""
    reads = []
    for side in ("columns", "rows"):
        read = getattr(module.StoredWeight, side)
        monkeypatch.setattr(
            module.StoredWeight, side, lambda self, index, read=read: reads.append(1) or read(self, index)
        )
    return reads


def factors(model, adapter="default"):
    return [layer.basis(adapter).factor for layer in layers(model)]


@both
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_load_reads_the_columns_twice(base, low_memory, tmp_path, taken):
    model = curlora(BASES[base]())
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    taken.clear()
    loaded = PeftModel.from_pretrained(BASES[base](), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert len(taken) == 2 * len(layers(loaded))  # once to add the adapter, and once to check it before loading
    assert torch.equal(loaded(tokens()).logits, expected)


def test_however_many_adapters_there_are(tmp_path, taken):
    source = curlora(llama())
    source.save_pretrained(tmp_path)
    model = curlora(llama(), r=3)
    for name in ("second", "third", "fourth"):
        model.load_adapter(tmp_path, name)
    before = factors(model)
    taken.clear()
    model.load_adapter(tmp_path, "fifth")
    assert len(taken) == 2 * len(layers(model))
    assert all(a is b for a, b in zip(factors(model), before, strict=True))
    model.set_adapter("fifth")
    assert torch.equal(model(tokens()).logits, source(tokens()).logits)


def test_onto_an_adapter_that_has_been_there_for_long_they_are_read_anew(tmp_path):
    """The weight may have been changed since in a way that autograd does not notice."""
    source = curlora(llama())
    source.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    layers(model)[0].get_base_layer().weight.data.mul_(1.01)
    with pytest.raises(ValueError, match=r"made on another base model.*1 of 6 layers"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("change", ["in place", "data", "rounded"])
def test_a_weight_that_changes_before_the_load_is_noticed(change, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    model = get_peft_model(llama(), CurloraConfig.from_pretrained(tmp_path))
    weight = layers(model)[0].get_base_layer().weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(1.01)
        if change == "data":
            weight.data.mul_(1.01)
    if change == "rounded":
        layers(model)[0].half().float()
    with pytest.raises(ValueError, match=r"made on another base model.*1 of 6 layers"):
        model.load_adapter(tmp_path, "default")


def test_columns_that_were_drawn_anew_before_the_load_are_not_taken_for_the_files(tmp_path):
    source = curlora(llama())
    source.save_pretrained(tmp_path)
    model = get_peft_model(llama(), CurloraConfig.from_pretrained(tmp_path)).eval()
    for layer in layers(model):
        layer.redraw("default", torch.arange(8).view(2, 4))
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(tokens()).logits, source(tokens()).logits)


def test_a_base_weight_that_is_loaded_is_followed_by_every_adapter():
    """The state dict of a whole model holds the adapters with the base model that they were made on."""
    source = curlora(llama(seed=1))
    source.add_adapter("second", CurloraConfig(r=3, seed=5, init_weights=False))
    target = curlora(llama())
    target.add_adapter("second", CurloraConfig(r=3))
    target.load_state_dict(source.state_dict())
    for adapter in ("default", "second"):
        source.set_adapter(adapter)
        target.set_adapter(adapter)
        assert torch.equal(target(tokens()).logits, source(tokens()).logits)


@both
def test_the_base_weight_alone_is_refused_where_adapters_belong_to_another(base):
    model = curlora(BASES[base]())
    other = curlora(BASES[base](seed=1)).state_dict()
    with pytest.raises(ValueError, match="made on another base model"):
        model.load_state_dict({name: tensor for name, tensor in other.items() if "base_layer" in name}, strict=False)


def test_another_draw_than_the_one_that_the_adapter_was_made_by_is_loaded(tmp_path):
    first, second = curlora(llama(), seed=1), curlora(llama(), seed=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = get_peft_model(llama(), CurloraConfig.from_pretrained(tmp_path / "first")).eval()
    model.load_adapter(tmp_path / "second", "default")
    assert torch.equal(model(tokens()).logits, second(tokens()).logits)


def test_what_was_read_for_a_load_that_never_came_is_not_taken_with_another_base(tmp_path):
    source = curlora(llama())
    model = curlora(llama(), seed=2)
    state = {f"base_model.model.{name}": tensor for name, tensor in source.base_model.model.state_dict().items()}
    adapter = {name: tensor for name, tensor in state.items() if "curlora_" in name}
    model.base_model._remap_adapter_state_dict_for_load(model, model.peft_config["default"], "default", adapter)
    other = curlora(llama(seed=1))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_one_adapter_that_is_refused_leaves_no_other_half_loaded():
    source, model = curlora(llama(), seed=1), curlora(llama(), seed=3)
    source.add_adapter("second", CurloraConfig(r=3, seed=5, init_weights=False))
    model.add_adapter("second", CurloraConfig(r=3))
    state = {name: tensor for name, tensor in source.state_dict().items() if "curlora_" in name}
    for name in state:
        if name.endswith("curlora_U.default.fingerprint"):
            state[name] = state[name].flip(0)
    with pytest.raises(ValueError, match=r"'default' was made on another base"):
        model.load_state_dict(state, strict=False)
    layer, right = layers(model)[0], layers(source)[0]
    assert torch.equal(layer.basis("second").factor, right.basis("second").factor)
    assert torch.equal(layer.basis("second").gathered, right.basis("second").gathered)


def test_what_is_refused_once_is_refused_again(tmp_path):
    model = curlora(llama())
    wrong = curlora(llama(seed=1)).state_dict()
    for _ in range(10):
        with pytest.raises(ValueError, match="made on another base model"):
            model.load_state_dict({k: v for k, v in wrong.items() if "curlora_" in k}, strict=False)
    for _ in range(10):
        with pytest.raises(ValueError, match="made on another base model"):
            model.double().eval()  # double() replaces the buffers
    source = curlora(llama(), seed=7)
    source.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model.eval()(tokens()).logits, source.double()(tokens()).logits)


def test_of_buffers_that_were_replaced_past_load_state_dict_the_adapters_are_looked_at(taken):
    model = curlora(llama())
    model.add_adapter("second", CurloraConfig(r=3))
    taken.clear()
    model.eval()
    assert not taken
    layer = layers(model)[0]
    U = layer.curlora_U["second"]
    U.indices = U.indices.clone()
    model.eval()
    assert not taken  # the indices are the same
    U.indices = U.indices.flip(1)
    with pytest.raises(ValueError, match=r"'second' was made on another base"):
        model.eval()
    assert len(taken) == 1


def test_programs_that_read_the_adapters_configuration(tmp_path):
    """After `import curlora` they find the base model and the adapter from the adapter's folder alone."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = curlora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(tokens()).logits
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(load.from_pretrained(tmp_path / "adapter").eval()(tokens()).logits, expected)
    tokenizer = word_tokenizer()
    writer = pipeline("text-generation", model=str(tmp_path / "adapter"), tokenizer=tokenizer, device="cpu")
    (written,) = writer("w1 w2", max_new_tokens=5, do_sample=False)
    ids = tokenizer("w1 w2", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert written["generated_text"].split()[-4:] == tokenizer.decode(answer[0], skip_special_tokens=True).split()[-4:]
