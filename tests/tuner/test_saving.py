"""Saved adapters: what they contain, that they load with the same outputs, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.models import BASES, curlora, layers, llama, tokens

ROOT = Path(__file__).parent.parent.parent
both = pytest.mark.parametrize("base", BASES)


@both
def test_a_fresh_process_gives_the_same_logits(base, tmp_path):
    model = curlora(BASES[base](), alpha=0.5)
    model.save_pretrained(tmp_path)
    torch.save(model(tokens()).logits, tmp_path / "logits.pt")
    code = f"""
import torch, curlora
from peft import PeftModel
from tests.models import {base}, tokens
model = PeftModel.from_pretrained({base}(), r"{tmp_path}").eval()
assert torch.equal(model(tokens()).logits, torch.load(r"{tmp_path}/logits.pt"))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_file_holds_U_the_indices_and_a_fingerprint_and_nothing_else(tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 3 * len(layers(model))
    for key, tensor in tensors.items():
        part = key.partition(".curlora_U.")[2]
        shape, dtype = {
            "weight": ((4, 4), torch.float32),
            "indices": ((2, 4), torch.int32),
            "fingerprint": ((8,), torch.int32),
        }[part]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


def change_config(path, **options):
    """Change options on purpose: the digest is replaced by ``"changed"``."""
    config = json.loads((path / "adapter_config.json").read_text())
    config["digest"] = "changed"
    (path / "adapter_config.json").write_text(json.dumps(config | options))


def test_the_model_card_says_how_to_load_it_once(tmp_path):
    model = curlora(llama())
    model.peft_config["default"].base_model_name_or_path = "maker/base"
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import curlora") == 1
    assert 'LlamaForCausalLM.from_pretrained("maker/base")' in card  # PEFT saves it if there is no task type
    assert ModelCard(card).data.library_name == "peft"  # PEFT's own part is unchanged
    model.peft_config["default"].task_type = "SEQ_CLS"
    model.save_pretrained(tmp_path / "classifier")
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("maker/base")' in card


def test_peft_without_curlora_says_how_to_load_it(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained(r'{tmp_path}')"
    error = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert error.startswith("KeyError: 'CURLORA: import curlora before")
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "lm-eval.md")]
    assert all(error in page.splitlines() for page in pages)


@pytest.mark.parametrize("kind", ["CURLORA", "CURLORA: as another version says it"])
def test_only_the_name_of_the_method_counts(kind, tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    assert PeftConfig.from_pretrained(tmp_path).peft_type is PeftType.CURLORA
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_indices_come_from_the_file_not_from_the_seed(tmp_path):
    model = curlora(llama(), seed=1)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, seed=999)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("low_memory", [True, False])
def test_low_cpu_mem_usage(low_memory, tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert all(p.device.type == "cpu" for p in loaded.parameters())


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_U_has_the_precision_that_is_asked_for_on_a_base_in_half_precision(autocast, dtype, low_memory, tmp_path):
    model = curlora(llama().bfloat16())
    model.save_pretrained(tmp_path)
    options = dict(low_cpu_mem_usage=low_memory, autocast_adapter_dtype=autocast)
    loaded = curlora(llama().bfloat16(), target_modules="all-linear", adapter_name="first")
    loaded.load_adapter(tmp_path, "second", is_trainable=True, **options)
    having = [layer for layer in layers(loaded) if "second" in layer.curlora_U]
    for ours, theirs in zip(having, layers(model), strict=True):
        U = ours.curlora_U["second"].weight
        assert U.dtype == dtype
        assert U.requires_grad
        assert torch.equal(U, theirs.curlora_U["default"].weight.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("v_proj", "q_proj")},
        {"target_modules": "all-linear", "exclude_modules": ("v_proj", "q_proj")},
        {"target_modules": ["v_proj"], "layers_to_transform": (1, 0)},
        {"target_modules": ["v_proj"], "layers_to_transform": (1, 0), "layers_pattern": ("layers", "h")},
        {"target_modules": ["v_proj"], "modules_to_save": ("norm", "lm_head")},
        {"target_modules": [], "target_parameters": ("q_proj.weight", "k_proj.weight")},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_are_tuples_are_loaded_again(options, tmp_path):
    model = curlora(llama(), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_load_a_second_adapter_beside_the_first(tmp_path):
    model = curlora(llama(), seed=3)
    model.save_pretrained(tmp_path)
    expected = model(tokens()).logits
    other = curlora(llama(), seed=4, r=3)
    own = other(tokens()).logits
    other.load_adapter(tmp_path, "loaded")
    assert torch.equal(other(tokens()).logits, own)
    other.set_adapter("loaded")
    assert torch.equal(other(tokens()).logits, expected)


def test_state_dict_round_trip():
    source, target = curlora(llama(), seed=1), curlora(llama(), seed=2)
    assert not torch.equal(source(tokens()).logits, target(tokens()).logits)
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert not result.unexpected_keys
    assert torch.equal(source(tokens()).logits, target(tokens()).logits)


def test_plain_load_state_dict_rebuilds_C():
    source, target = curlora(llama(), seed=1), curlora(llama(), seed=2)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(tokens()).logits, target(tokens()).logits)


def test_loaded_adapters_can_be_trained_on(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ids = tokens()
    loaded(ids, labels=ids).loss.backward()
    assert all(layer.curlora_U["default"].weight.grad.abs().sum() > 0 for layer in layers(loaded))


def test_another_base_is_refused_with_a_sentence(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"made on another base model.*6 of 6 layers.*Load it onto the model"):
        PeftModel.from_pretrained(llama(seed=1), tmp_path)


def test_a_changed_base_is_refused(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    changed = llama()
    changed.model.layers[1].self_attn.v_proj.weight.data *= 1.01
    with pytest.raises(ValueError, match=r"1 of 6 layers \(.*layers\.1\.self_attn\.v_proj"):
        PeftModel.from_pretrained(changed, tmp_path)


def test_a_changed_base_is_refused_by_plain_load_state_dict_too():
    state = curlora(llama()).state_dict()
    target = curlora(llama(seed=1))
    adapter_only = {k: v for k, v in state.items() if "curlora_" in k}
    with pytest.raises(ValueError, match="made on another base model"):
        target.load_state_dict(adapter_only, strict=False)


def test_another_precision_is_loaded_with_a_warning(tmp_path):
    model = curlora(llama())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another precision or quantization"):
        loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path).eval()
    expected = model(tokens()).logits
    assert (loaded(tokens()).logits.float() - expected).norm() / expected.norm() < 0.05


def test_nothing_is_loaded_into_a_merged_model(tmp_path):
    curlora(llama(), seed=1).save_pretrained(tmp_path)
    model = curlora(llama(), seed=2)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"cannot be loaded while adapters are merged.*Unmerge first"):
        model.load_adapter(tmp_path, "default")
    other = curlora(llama(), seed=3)
    state = {k: v for k, v in other.state_dict().items() if "curlora_" in k}
    state = {k: v.flip(1) if k.endswith(".indices") else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match=r"other indices were loaded.*Unmerge, then load again"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("low_memory", [True, False])
def test_a_refused_load_leaves_the_base_as_it_was(low_memory, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    base = llama(seed=1)
    expected = base(tokens()).logits
    with pytest.raises(ValueError, match=r"made on another base model.*The model is as it was\."):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    assert not layers(base)
    assert torch.equal(base(tokens()).logits, expected)


@pytest.mark.parametrize("low_memory", [True, False])
def test_a_refused_load_leaves_the_name_free(low_memory, tmp_path):
    curlora(llama(), r=3).save_pretrained(tmp_path)
    damage(tmp_path, weight=set_first(float("nan")))
    model = curlora(llama())
    before = model(tokens()).logits
    with pytest.raises(ValueError, match=r"The model is as it was\."):
        model.load_adapter(tmp_path, "new", low_cpu_mem_usage=low_memory)
    assert set(model.peft_config) == {"default"}
    assert all(set(layer.r) == {"default"} for layer in layers(model))
    assert torch.equal(model(tokens()).logits, before)
    curlora(llama(), seed=5).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "new")


def damage(path, **replacements):
    tensors = load_file(path / "adapter_model.safetensors")
    for part, change in replacements.items():
        key = next(k for k in tensors if k.endswith(f".curlora_U.{part}"))
        value = change(tensors.pop(key))
        if value is not None:
            tensors[key] = value
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def set_first(value):
    def change(tensor):
        tensor[..., 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", lambda t: None, r"curlora_U\.default\.weight is missing"),
        ("indices", lambda t: None, r"curlora_U\.default\.indices is missing"),
        ("weight", set_first(float("nan")), "U contains NaN"),
        ("weight", lambda t: t[:2, :2].clone(), r"U has shape \(2, 2\), but the configuration says \(4, 4\)"),
        ("indices", set_first(-1), r"column index -1 is outside 0\.\.31"),
        ("indices", set_first(10_000), r"column index 10000 is outside 0\.\.31"),
        ("indices", lambda t: t.float(), "the indices are torch.float32"),
        ("fingerprint", lambda t: t[:3].clone(), "fingerprint of the base is damaged"),
    ],
)
def test_damaged_adapters_are_refused(part, change, message, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    damage(tmp_path, **{part: change})
    with pytest.raises(ValueError, match=f"does not fit this model and was not loaded.*{message}"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_extra_layers_are_refused(tmp_path):
    curlora(llama(), target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path)
    change_config(tmp_path, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="o_proj.* belongs to no adapted layer"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -10])
def test_truncated_files_are_refused_before_the_model_is_touched(keep, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    base = llama()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read .*incomplete or damaged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers(base)


def test_pickles_are_never_opened(tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    torch.save({"x": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        PeftModel.from_pretrained(llama(), tmp_path)
    assert not (tmp_path / "exploded").exists()
