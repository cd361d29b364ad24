"""Adapters as LoRA and merged compute the same function, in unmodified PEFT and transformers."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import curlora
from curlora.convert import AdapterError, load_with_base
from curlora.inspection import inspect_adapter
from curlora_cli.commands import app
from tests.models import BASES, gpt2, layers, llama, randomize, tokens
from tests.models import curlora as adapted

both = pytest.mark.parametrize("base", BASES)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def as_lora(model, base, path, **kwargs):
    curlora.save_as_lora(path, model, **kwargs)
    return PeftModel.from_pretrained(base, path).eval()


@both
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3}, {"r": 1, "alpha": 20.0}, {"target_modules": "all-linear"}])
def test_the_same_logits_as_a_lora_adapter(base, options, tmp_path):
    model = adapted(BASES[base](), **options)
    loaded = as_lora(model, BASES[base](), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    expected = model(tokens()).logits
    assert relative(expected, BASES[base]()(tokens()).logits) > 1e-3
    assert relative(loaded(tokens()).logits, expected) < 1e-5


@pytest.mark.parametrize(("base", "embedding"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_an_embedding_is_converted_under_loras_names(base, embedding, tmp_path):
    model = adapted(BASES[base](), target_modules=[embedding], alpha=0.5)
    expected = model(tokens()).logits
    assert relative(expected, BASES[base]()(tokens()).logits) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it misses
        loaded = as_lora(model, BASES[base](), tmp_path)
    assert relative(loaded(tokens()).logits, expected) < 1e-5


@both
def test_the_factors_are_the_formula_in_float64(base):
    model = adapted(BASES[base]().double(), alpha=0.7)
    _, state = curlora.convert_to_lora(model)
    for name, layer in model.base_model.model.named_modules():
        if layer in layers(model):
            W = layer.get_base_layer().weight
            columns, rows = layer.basis("default").indices
            dense = 0.7 * W[:, columns] @ layer.curlora_U["default"].weight @ W[rows]
            A, B = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            assert relative((B @ A).T if base == "gpt2" else B @ A, dense) < 1e-14


def test_ranks_by_layer_are_filled_up_so_that_the_scaling_is_one_everywhere(tmp_path):
    model = adapted(llama(), rank_pattern={"k_proj": 7}, alpha_pattern={"q_proj": 2.0})
    loaded = as_lora(model, llama(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    assert {tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in k} == {
        (7, 32)
    }
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*1\.self_attn\.(q|o)_proj"},
    ],
)
def test_only_the_adapted_layers_are_lora_layers(options, tmp_path):
    model = adapted(llama(), **options)
    loaded = as_lora(model, llama(), tmp_path)
    names = {name for name, layer in model.named_modules() if layer in layers(model)}
    assert {name for name, layer in loaded.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)} == names
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5


def test_adapters_that_are_active_together_become_one(tmp_path):
    model = adapted(llama())
    model.add_adapter("second", curlora.CurloraConfig(r=3, seed=5, target_modules=["q_proj", "o_proj"]))
    randomize(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    loaded = as_lora(model, llama(), tmp_path)
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5
    model.set_adapter("second")
    alone = as_lora(model, llama(), tmp_path / "alone", adapter_names="second")
    assert relative(alone(tokens()).logits, model(tokens()).logits) < 1e-5


def test_a_head_goes_with_it(tmp_path):
    def base():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(llama().config).eval()

    model = get_peft_model(base(), curlora.CurloraConfig(r=4, task_type="SEQ_CLS")).eval()
    randomize(model)
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    for one in (model, loaded := as_lora(model, base(), tmp_path)):
        one.config.pad_token_id = 0
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5


def test_embeddings_of_tokens_go_with_it(tmp_path):
    model = get_peft_model(llama(), curlora.CurloraConfig(r=4, trainable_token_indices=[3, 50])).eval()
    randomize(model)
    torch.nn.init.normal_(model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"])
    ids = torch.cat([tokens(), torch.tensor([[3], [50]])], dim=1)
    loaded = as_lora(model, llama(), tmp_path)
    assert relative(loaded(ids).logits, model(ids).logits) < 1e-5
    model.add_adapter("second", curlora.CurloraConfig(r=4))
    with pytest.raises(AdapterError, match="some trained more than U"):
        curlora.convert_to_lora(model, ["default", "second"])


def test_a_bfloat16_base_gives_float32_factors_of_its_own_numbers(tmp_path):
    model = adapted(llama().bfloat16())
    _, state = curlora.convert_to_lora(model)
    assert {t.dtype for t in state.values()} == {torch.float32}
    layer = layers(model)[0]
    W = layer.get_base_layer().weight.float()
    columns, rows = layer.basis("default").indices
    dense = W[:, columns] @ layer.curlora_U["default"].weight.float() @ W[rows]
    A, B = (state[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert relative(B @ A, dense) < 1e-6


def test_a_model_that_was_injected_into(tmp_path):
    model = inject_adapter_in_model(curlora.CurloraConfig(r=4, target_modules=["q_proj"]), llama())
    randomize(model)
    loaded = as_lora(model, llama(), tmp_path)
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5


@both
def test_pefts_own_conversion(base, tmp_path):
    """PEFT uses a singular value decomposition, which is a little less exact."""
    model = adapted(BASES[base]())
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=4)
    loaded = PeftModel.from_pretrained(BASES[base](), tmp_path).eval()
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-4


def test_what_cannot_be_converted_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(AdapterError, match="no CURLoRA layer"):
        curlora.save_as_lora(tmp_path / "out", get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    model = adapted(llama())
    with pytest.raises(AdapterError, match=r"no adapter \['other'\]; there are \['default'\]"):
        curlora.save_as_lora(tmp_path / "out", model, "other")
    model.base_model.set_adapter([])
    with pytest.raises(AdapterError, match=r"None of the CURLoRA adapters \['default'\] is active: name"):
        curlora.save_as_lora(tmp_path / "out", model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into the weights.*Unmerge first"):
        curlora.save_as_lora(tmp_path / "out", model)
    with pytest.raises(AdapterError, match="trained biases"):
        curlora.save_as_lora(tmp_path / "out", adapted(llama(), bias="all"))
    assert not (tmp_path / "out").exists()


class TestCommands:
    @pytest.fixture
    def saved(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), alpha=0.5, rank_pattern={"v_proj": 2})
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path, model

    def call(self, *arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_convert_to_lora(self, saved):
        path, model = saved
        done = self.call("convert", path / "adapter", "--to", "lora", "--out", path / "lora")
        assert done.exit_code == 0, done.output
        loaded = PeftModel.from_pretrained(llama(), path / "lora").eval()
        assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5
        assert json.loads((path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            path / "base"
        )

    def test_convert_to_a_merged_model(self, saved):
        path, model = saved
        done = self.call(
            "convert", path / "adapter", "--to", "merged", "--out", path / "merged", "--base", path / "base"
        )
        assert done.exit_code == 0, done.output
        loaded = AutoModelForCausalLM.from_pretrained(path / "merged").eval()
        assert relative(loaded(tokens()).logits, model(tokens()).logits) < 1e-5

    def test_a_folder_that_is_not_empty_is_left_alone(self, saved):
        path, _ = saved
        (path / "out").mkdir()
        (path / "out" / "notes.txt").write_text("mine")
        done = self.call("convert", path / "adapter", "--to", "lora", "--out", path / "out")
        assert done.exit_code == 1
        assert "is not an empty folder" in done.output
        assert [file.name for file in (path / "out").iterdir()] == ["notes.txt"]

    def test_another_base_is_refused(self, saved):
        path, _ = saved
        llama(seed=1).save_pretrained(path / "other")
        done = self.call("convert", path / "adapter", "--to", "lora", "--out", path / "out", "--base", path / "other")
        assert done.exit_code == 1
        assert "made on another base model" in done.output
        assert not (path / "out").exists()

    def test_a_base_that_has_moved_is_named(self, saved):
        path, _ = saved
        (path / "base").rename(path / "elsewhere")
        done = self.call("convert", path / "adapter", "--to", "lora", "--out", path / "out")
        assert done.exit_code == 1
        said = done.output.replace("\n", "")
        assert f"The base model of {path / 'adapter'}: there is no folder {path / 'base'}." in said
        assert "Repo id" not in said
        done = self.call(
            "convert", path / "adapter", "--to", "lora", "--out", path / "out", "--base", path / "elsewhere"
        )
        assert done.exit_code == 0, done.output

    @pytest.mark.parametrize("to", ["lora", "merged"])
    def test_a_full_disk_leaves_nothing(self, saved, monkeypatch, to):
        path, _ = saved

        def half(folder, *_):
            folder.mkdir()
            (folder / "half").write_text("half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("curlora.convert.save_as_lora", half)
        monkeypatch.setattr("curlora.convert.save_merged", half)
        done = self.call("convert", path / "adapter", "--to", to, "--out", path / "out")
        assert done.exit_code == 1
        assert "Error: The disk is full." in done.output
        assert not (path / "out").exists()

    def test_no_adapter_or_another_kind(self, saved):
        path, _ = saved
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(path / "lora")
        for command in (("inspect",), ("convert", "--to", "lora", "--out", path / "out")):
            done = self.call(*command, path / "lora")
            assert done.exit_code == 1
            assert "of type LORA, not CURLORA" in done.output.replace("\n", " ")
            done = self.call(*command, path / "nothing")
            assert done.exit_code == 1
            assert str(path / "nothing") in done.output.replace("\n", "")

    def test_inspect(self, saved):
        path, model = saved
        done = self.call("inspect", path / "adapter")
        assert done.exit_code == 0, done.output
        assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad)}" in done.output.replace(",", "")
        summary = inspect_adapter(path / "adapter", with_base=True)
        found = {one.name: one for one in summary.layers}
        for name, layer in model.base_model.model.named_modules():
            if layer in layers(model):
                dense = layer.get_delta_weight("default")
                assert found[name].r == layer.r["default"]
                assert found[name].norm == pytest.approx(layer.curlora_U["default"].weight.norm().item(), rel=1e-6)
                expected = float(dense.norm() / layer.get_base_layer().weight.norm())
                assert found[name].change == pytest.approx(expected, rel=1e-5)
        done = self.call("inspect", path / "adapter", "--with-base")
        assert done.exit_code == 0, done.output

    def test_inspect_of_experts(self, tmp_path):
        sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        base = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
        base.save_pretrained(tmp_path / "base")
        model = adapted(base, r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.peft_config["default"].task_type = "CAUSAL_LM"
        model.save_pretrained(tmp_path / "adapter")
        found = inspect_adapter(tmp_path / "adapter", with_base=True).layers
        expected = [
            (layer.get_delta_weight("default").norm() / layer._plain_weight().norm()).item() for layer in layers(model)
        ]
        assert [one.r for one in found] == [3, 3]
        assert sorted(one.change for one in found) == pytest.approx(sorted(expected), rel=1e-5)

    def test_inspect_of_an_adapter_in_the_first_format(self):
        summary = inspect_adapter(Path(__file__).parent / "tuner" / "saved_before" / "linear")
        assert [one.r for one in summary.layers] == [2, 2]
        assert summary.parameters == 8

    def test_a_damaged_file(self, saved):
        path, _ = saved
        file = path / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        done = self.call("inspect", path / "adapter")
        assert done.exit_code == 1
        assert "incomplete or damaged" in done.output.replace("\n", " ")


def test_a_file_does_not_say_what_is_imported(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "Popen", "parent_library": "subprocess"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_with_base(str(tmp_path / "adapter"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
