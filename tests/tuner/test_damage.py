"""A damaged adapter is refused, or loads with the same outputs. Every refusal is a sentence."""

import copy
import json
import os
import random
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from curlora import CurloraConfig
from tests.models import curlora, llama, randomize, tokens
from tests.tuner.saved_before.models import INPUTS, conv1d, linear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Ten thousand take a minute: CURLORA_DAMAGES=10000 pytest tests/tuner/test_damage.py
COUNT = int(os.environ.get("CURLORA_DAMAGES", "400"))


@pytest.fixture(params=[linear, conv1d], ids=["linear", "conv1d"])
def saved(request, tmp_path):
    """An adapter's folder, a function that makes its base model, and the adapted model's outputs."""
    config = CurloraConfig(r=2, alpha=1.5, target_modules=["first", "second"], rank_pattern={"second": 3}, seed=7)
    model = get_peft_model(request.param(), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", request.param, model(INPUTS).detach()


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(data, rng):
    begin, end = sorted(rng.sample(range(len(data) + 1), 2))
    return data[:begin] + data[end:]


def cut_off(data, rng):
    return data[: rng.randrange(len(data))]


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]


def swap(data, rng):
    size = rng.randint(1, 8)
    a, b = sorted(rng.sample(range(len(data) - size), 2))
    if b - a < size:
        return swap(data, rng)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def overwrite(data, rng):
    size = rng.randint(1, 16)
    at = rng.randrange(len(data) - size)
    return data[:at] + rng.randbytes(size) + data[at + size :]


def assert_a_sentence(error):
    text = str(error)
    assert isinstance(error, ValueError), (type(error), text)
    assert len(text.split()) >= 5, text
    assert "Traceback" not in text
    assert text.count("\n") == 0, text


def test_no_random_damage_loads_silently(saved, tmp_path):
    folder, base, expected = saved

    def outputs(damaged):
        return PeftModel.from_pretrained(base(), damaged).eval()(INPUTS)

    assert damages_refused(COUNT, folder, outputs, expected, tmp_path / "damaged") > COUNT * 0.7


def test_no_random_damage_loads_silently_by_transformers(tmp_path):
    model = curlora(llama(), r=2, alpha=1.5)
    model.save_pretrained(tmp_path / "saved")
    base = llama()

    def outputs(damaged):
        loaded = copy.deepcopy(base)
        loaded.load_adapter(damaged)
        return loaded(tokens()).logits

    expected, count = model(tokens()).logits, COUNT // 4
    assert damages_refused(count, tmp_path / "saved", outputs, expected, tmp_path / "damaged") > count * 0.7


def damages_refused(count, folder, outputs, expected, target):
    """Damage a saved adapter ``count`` times in the folder ``target``, and return how many were refused.

    Each damaged adapter must be refused, or have the expected outputs.
    """
    rng = random.Random(0)
    original = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    refused = 0
    for _ in range(count):
        name = rng.choice((WEIGHTS, WEIGHTS, CONFIG))
        damaged = rng.choice((flip, cut, cut_off, insert, swap, overwrite))(original[name], rng)
        if damaged == original[name]:
            continue
        shutil.copytree(folder, target, dirs_exist_ok=True)
        (target / name).write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = outputs(str(target))
        except Exception as error:
            refused += 1
            assert_a_sentence(error)
        else:  # the damage changed, say, the base model's path, on which no output depends
            assert torch.equal(found, expected), (name, damaged[:2000])
        shutil.rmtree(target)
    return refused


@pytest.mark.parametrize("entry", ["weight", "indices", "fingerprint"])
def test_a_tensor_that_was_changed_under_the_same_metadata_is_noticed(entry, saved):
    folder, base, _ = saved
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    name = f"base_model.model.first.curlora_U.{entry}"
    tensors[name] = tensors[name].flip(0).clone() if entry != "weight" else tensors[name] + 1e-6
    save_file(tensors, folder / WEIGHTS, metadata)
    with pytest.raises(ValueError, match=r"is damaged: its tensors are not those that were saved"):
        PeftModel.from_pretrained(base(), folder)


def test_tensors_that_are_saved_beside_U_are_covered(tmp_path):
    model = get_peft_model(linear(), CurloraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.second.bias"] += 1e-6
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        PeftModel.from_pretrained(linear(), tmp_path)


def test_a_file_without_a_digest_loads(saved):
    folder, base, expected = saved
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    assert torch.equal(PeftModel.from_pretrained(base(), folder).eval()(INPUTS), expected)


def test_a_file_of_a_later_version_is_refused(saved):
    folder, base, _ = saved
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "curlora_format": "3"})
    with pytest.raises(ValueError, match="format '3', and this curlora reads up to 2: update"):
        PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", 1.6), ("seed", 8), ("rank_pattern", {}), ("target_modules", ["first"]), ("sampling", "norm")],
)
def test_an_option_that_was_changed_is_noticed_and_may_be_on_purpose(option, value, saved):
    folder, base, _ = saved
    options = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**options, option: value}))
    with pytest.raises(ValueError, match='not the one that was saved .*differs.* write "digest": "changed" into'):
        PeftModel.from_pretrained(base(), folder)
    (folder / CONFIG).write_text(json.dumps({**options, option: value, "digest": "changed"}))
    assert getattr(CurloraConfig.from_pretrained(str(folder)), option) == (
        set(value) if option == "target_modules" else value
    )


def test_a_digest_that_was_cut_out_is_missed(saved):
    folder, base, _ = saved
    options = json.loads((folder / CONFIG).read_text())
    del options["digest"], options["alpha"]
    (folder / CONFIG).write_text(json.dumps(options))
    with pytest.raises(ValueError, match="not the one that was saved .*digest is missing"):
        PeftModel.from_pretrained(base(), folder)


def test_where_the_base_is_may_be_changed(saved):
    folder, base, expected = saved
    options = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**options, "base_model_name_or_path": "elsewhere", "revision": "x"}))
    assert torch.equal(PeftModel.from_pretrained(base(), folder).eval()(INPUTS), expected)


UNREADABLE = {
    "{": json.JSONDecodeError,
    "[]": TypeError,
    '{"r": 2}': KeyError,
    '{"peft_type": "CURLPRA"}': KeyError,
    '{"peft_type": ["CURLORA"]}': TypeError,
}


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize("version", [1, 2])
def test_a_configuration_that_says_nothing_is_refused_with_a_sentence(text, version, saved):
    folder, base, _ = saved
    if version == 1:
        tensors = {key.replace(".curlora_U.weight", ".curlora_U"): U for key, U in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(text)
    for read in (lambda: PeftModel.from_pretrained(base(), folder), lambda: PeftConfig.from_pretrained(folder)):
        with pytest.raises(ValueError, match="adapter_config.json does not configure the CURLoRA adapter") as caught:
            read()
        assert_a_sentence(caught.value)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("option", ["rank_pattern", "target_modules", "curlora_dropout", "seed"])
def test_an_option_of_a_wrong_type_is_refused_with_a_sentence(option, saved):
    folder, base, _ = saved
    options = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**options, option: [{}]}))
    for read in (lambda: PeftModel.from_pretrained(base(), folder), lambda: PeftConfig.from_pretrained(folder)):
        with pytest.raises(ValueError, match="cannot be used .*it is damaged|not the one that was saved") as caught:
            read()
        assert_a_sentence(caught.value)


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize("weights", [True, False])
def test_errors_about_adapters_of_other_methods_are_pefts(text, weights, tmp_path):
    get_peft_model(linear(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    if not weights:
        (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UNREADABLE[text]) as caught:
        PeftModel.from_pretrained(linear(), tmp_path)
    assert type(caught.value) is UNREADABLE[text]
    assert "damaged" not in str(caught.value)
    with pytest.raises((KeyError, TypeError, json.JSONDecodeError)):
        PeftConfig.from_pretrained(tmp_path)
