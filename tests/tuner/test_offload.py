"""A model that Accelerate has offloaded has the same outputs, bit for bit, as the model that is not offloaded.

The same holds of what the guard measures on it.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from curlora import CurloraConfig, Guard, calibrate, redraw
from curlora.functional import gather_update, gather_update_by_row, linear_update
from curlora.guard import GuardError, own_text, perplexity
from curlora.tuner.basis import Basis
from curlora.tuner.linking_matrix import ParameterMatrix
from curlora.tuner.weight import running_device
from tests.models import BASES, curlora, layers, llama, randomize, tokens, word_tokenizer

both = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
CPU = torch.device("cpu")


def offload_all(model, folder):
    return cpu_offload(model, CPU)


def offload_all_and_buffers(model, folder):
    return cpu_offload(model, CPU, offload_buffers=True)


def offload_to_disk(model, folder):
    return disk_offload(model, folder, execution_device=CPU)


PARTS = {
    "llama": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"},
    "gpt2": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.h.0": "disk",
             "transformer.h.1": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"},
}  # fmt: skip


def offload_half(model, folder):
    """Offload like ``device_map="auto"`` if a part does not fit: some layers in memory and some on disk."""
    parts = PARTS[model.config.model_type]
    if isinstance(model, PeftModel):
        parts = {f"base_model.model.{name}": place for name, place in parts.items()}
    return dispatch_model(model, parts, main_device=CPU, offload_dir=folder)


HOW = [offload_all, offload_all_and_buffers, offload_to_disk, offload_half]
every_way = pytest.mark.parametrize("offload", HOW, ids=[way.__name__ for way in HOW])


@both
@every_way
def test_an_adapted_model_that_is_offloaded(base, offload, tmp_path):
    expected = curlora(base())(tokens()).logits
    model = curlora(base())
    offload(model, tmp_path)
    for _ in range(3):
        assert torch.equal(model(tokens()).logits, expected)


@both
@every_way
def test_an_adapter_that_is_made_on_an_offloaded_model(base, offload, tmp_path):
    expected = curlora(base())
    model = base()
    offload(model, tmp_path)
    model = get_peft_model(model, CurloraConfig(r=4)).eval()
    randomize(model)
    for layer, other in zip(layers(model), layers(expected), strict=True):
        assert torch.equal(layer.basis("default").indices, other.basis("default").indices)
        assert torch.equal(layer.basis("default").factor, other.basis("default").factor)
    for _ in range(2):
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


@both
@every_way
@pytest.mark.parametrize("low_memory", [False, True])
def test_an_adapter_that_is_loaded_onto_an_offloaded_model(base, offload, low_memory, tmp_path):
    expected = curlora(base())
    expected.save_pretrained(tmp_path / "adapter")
    model = base()
    offload(model, tmp_path / "weights")
    if offload is offload_half:
        model.hf_device_map = None  # otherwise PEFT would dispatch the model again, see below
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", low_cpu_mem_usage=low_memory).eval()
    for _ in range(2):
        assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


@both
@pytest.mark.parametrize("lowest", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["curlora", "lora"])
def test_from_pretrained_dispatches_a_model_with_a_device_map_anew(base, lowest, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT turns a path that begins with a slash into a relative one, and writes there
    base().save_pretrained(tmp_path / "models--base")  # PEFT takes its name from the part with two hyphens
    config = CurloraConfig(r=4) if method == "curlora" else LoraConfig(init_lora_weights=False)
    adapter = get_peft_model(base(), config).eval()
    randomize(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    device_map = {part: lowest if place == "disk" else place for part, place in PARTS[base().config.model_type].items()}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "models--base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    again = {f"base_model.model.{part}": place for part, place in device_map.items()}
    loaded = PeftModel.from_pretrained(
        model, tmp_path / "adapter", device_map=again, offload_folder=tmp_path / "again"
    ).eval()
    torch.testing.assert_close(loaded(tokens()).logits, adapter(tokens()).logits, rtol=0, atol=0)


@every_way
def test_every_adapter_of_a_batch_and_several_at_once(offload, tmp_path):
    def two():
        model = curlora(llama())
        model.add_adapter("second", CurloraConfig(r=3, seed=1))
        randomize(model, "second", seed=5)
        return model

    names = ["default", "second"]
    expected = two()
    model = two()
    offload(model, tmp_path)
    assert torch.equal(model(tokens(), adapter_names=names).logits, expected(tokens(), adapter_names=names).logits)
    for one in (model, expected):
        one.base_model.set_adapter(names)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_an_offloaded_model_is_merged_and_unmerged():
    expected = curlora(llama())
    plain = expected(tokens()).logits
    model = curlora(llama())
    cpu_offload(model, CPU)
    expected.merge_adapter()
    model.merge_adapter()
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    model.unmerge_adapter()
    assert torch.equal(model(tokens()).logits, plain)


TEXT = [{"input_ids": tokens(seed=1, batch=4, length=8)}]
TASK = [{"input_ids": ids, "labels": ids} for ids in tokens(seed=3, batch=4, length=9).split(2)]


def guarded(model):
    """Choose columns and rows, calibrate, and take one guarded step. Return everything that was found."""
    model = get_peft_model(model, CurloraConfig(r=4)).eval()
    redraw(model, TASK, TEXT, progress=False)
    calibration = calibrate(model, TEXT, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    guard = Guard(model, calibration, budget=0.01)
    guard.attach(optimizer)
    model(**TASK[0]).loss.backward()
    optimizer.step()
    matrices = [layer.matrices["default"].weight.detach() for layer in layers(model)]
    return [*calibration.state_dict().values(), *matrices], [perplexity(model, TEXT), guard.drift()]


@both
@every_way
@pytest.mark.filterwarnings("ignore:The guard's text has")
def test_the_guard_of_an_offloaded_model(base, offload, tmp_path):
    tensors, numbers = guarded(base())
    model = base()
    offload(model, tmp_path)
    found, measured = guarded(model)
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert measured == numbers


@every_way
def test_an_offloaded_model_writes_the_same_text(offload, tmp_path):
    words = word_tokenizer()
    words.bos_token = "w90"
    options = dict(tokens=60, max_length=12, cache=None, progress=False)
    expected = own_text(llama(), words, **options)
    model = llama()
    offload(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(own_text(model, words, **options), expected, strict=True))


@pytest.mark.parametrize("measure", [calibrate, lambda *given, **how: redraw(given[0], TASK, *given[1:], **how)])
def test_an_adapter_that_was_offloaded_itself_is_not_calibrated(measure):
    model = curlora(llama())
    cpu_offload(model, CPU)
    with pytest.raises(GuardError, match="U of .*q_proj.* is on the meta device.*after the base model was offloaded"):
        measure(model, TEXT, progress=False)


def test_where_a_model_runs():
    model = llama()
    assert running_device(model) == CPU
    model.model.embed_tokens.to("meta")
    assert running_device(model) == CPU  # of the first parameter with values
    assert running_device(model.to("meta")) == torch.device("meta")
    layer = nn.Sequential(nn.Linear(2, 3))
    cpu_offload(layer, torch.device("cuda:0"))
    assert running_device(layer) == torch.device("cuda:0")


@pytest.mark.parametrize("which", ["output", "U", "factor"])
def test_a_tensor_without_values_never_gives_numbers(which):
    tensors = {"output": torch.randn(3, 6), "U": torch.randn(2, 2), "factor": torch.randn(6, 2)}
    tensors[which] = tensors[which].to("meta")
    output, U, factor = tensors.values()
    index, z = torch.tensor([0, 1]), torch.randn(3, 2)
    for give in (
        lambda: gather_update(output, U, factor, index),
        lambda: gather_update_by_row(output, U.expand(3, 2, 2), factor, index),
        lambda: linear_update(output, z, U, factor),
    ):
        with pytest.raises(RuntimeError, match=f"{which} is on the meta device"):
            give()


def test_a_parameter_is_not_updated_by_a_matrix_without_values():
    U = ParameterMatrix((2, 2), 1.0, dtype=torch.float32, device=torch.device("meta"))
    basis = Basis.taken(torch.zeros(2, 2), torch.zeros(2), torch.ones(6, 2), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="U is on the meta device"):
        U(torch.ones(6, 5), basis)


def test_an_adapter_without_values_never_gives_numbers():
    model = llama()
    model = get_peft_model(model, CurloraConfig(r=4), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="has no values"):
        model(tokens())
