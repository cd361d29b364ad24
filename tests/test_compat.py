"""Each function that uses another library's private name, with the name and without it."""

import json
import sys
import types

import peft.tuners.lora
import peft.tuners.mixed.model
import peft.tuners.tuners_utils
import peft.utils.hotswap
import peft.utils.transformers_weight_conversion
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import (
    DefaultFlowCallback,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import CallbackHandler

from curlora import CurloraConfig, CurloraLayer, CurloraModel, _compat
from curlora.tuner.format import is_adapter
from tests.models import curlora, llama
from tests.tuner.test_experts import mixtral, qwen3

PRIVATE = pytest.mark.parametrize("there", [True, False], ids=["with it", "without"])


def take_away(monkeypatch, there, module, *names):
    for name in names if not there else ():
        monkeypatch.delattr(module, name)


def test_the_method_is_registered_once():
    assert PeftType("CURLORA") is PeftType.CURLORA
    assert PeftType["CURLORA"].value == "CURLORA"
    with pytest.raises(ImportError, match="already has a method called CURLORA"):
        _compat.add_peft_type("CURLORA")


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_how_a_model_computes_attention(kind):
    assert _compat.attention_implementation(LlamaConfig(attn_implementation=kind)) == kind
    assert _compat.attention_implementation(types.SimpleNamespace()) == "sdpa"  # without transformers' private name


class Quantized(nn.Module):
    infeatures, outfeatures = 3, 5


@PRIVATE
@pytest.mark.parametrize(
    ("layer", "expected"),
    [(nn.Linear(3, 5), (3, 5)), (Conv1D(5, 3), (3, 5)), (nn.Embedding(7, 2), (7, 2)), (Quantized(), (3, 5))],
)
def test_in_out_features(layer, expected, there, monkeypatch):
    take_away(monkeypatch, there, peft.tuners.tuners_utils, "_get_in_out_features")
    assert _compat.in_out_features(layer) == expected


@PRIVATE
def test_features_that_nobody_knows(there, monkeypatch):
    take_away(monkeypatch, there, peft.tuners.tuners_utils, "_get_in_out_features")
    with pytest.raises(TypeError, match="a ReLU does not say how many inputs and outputs"):
        _compat.in_out_features(nn.ReLU())


class Packed:
    """A 4-bit weight with only the attributes that are read."""

    compress_statistics = True
    data = torch.zeros(2, dtype=torch.uint8)

    def __init__(self, data=None, **options):
        self.__dict__.update(options)


def test_a_weight_that_is_not_packed_stays_as_it_is():
    weight = nn.Parameter(torch.zeros(2))
    assert _compat.unpacked_4bit(weight) is weight


@PRIVATE
def test_a_packed_weight(there, monkeypatch):
    """The real inverse is tested in tests/tuner/test_quantized.py, on a real weight."""
    module = types.ModuleType("bitsandbytes.functional")
    if there:
        module._convert_weight_packed_for_cpu_inverse = lambda data, state: (data, state)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", module)
    weight = Packed()
    weight.quant_state = types.SimpleNamespace(
        packing_format_for_cpu=True, absmax=torch.ones(2, 1), blocksize=64, quant_type="nf4"
    )
    if there:
        assert _compat.unpacked_4bit(weight).quant_type == "nf4"
    else:
        with pytest.raises(ValueError, match="cannot unpack it. Load the model anew"):
            _compat.unpacked_4bit(weight)


@PRIVATE
def test_modules_of_mamba_that_are_never_called(there, monkeypatch):
    take_away(monkeypatch, there, peft.tuners.tuners_utils, "_check_lora_target_modules_mamba")
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    mixer = model.backbone.layers[0].mixer
    config = CurloraConfig()
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        _compat.refuse_what_reads_the_weight(config, model, mixer, "out_proj")
    _compat.refuse_what_reads_the_weight(config, model, mixer, "in_proj")
    assert config.peft_type == PeftType.CURLORA


@PRIVATE
@pytest.mark.parametrize("base", [qwen3, mixtral])
def test_names_of_experts(base, there, monkeypatch):
    take_away(monkeypatch, there, peft.utils.transformers_weight_conversion, "_convert_peft_config_moe")
    named = ["q_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]
    config = CurloraConfig(r=3, target_modules=named)
    _compat.convert_expert_names(config, base())
    if there:
        assert config.target_parameters == ["down_proj", "gate_up_proj"]
        assert "q_proj" in config.target_modules
    else:
        assert config.target_parameters is None
        assert config.target_modules == set(named)
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (3, {}, {})


@pytest.mark.parametrize("gone", [None, "PREFIXES", "Layers", "MixedModel"])
def test_mixed_models(gone, monkeypatch):
    mixed = peft.tuners.mixed.model
    for name in ("COMPATIBLE_TUNER_TYPES", "Layers", "Configs"):
        monkeypatch.setattr(mixed, name, getattr(mixed, name))
    monkeypatch.setattr(mixed, "PREFIXES", list(mixed.PREFIXES))
    monkeypatch.setattr(mixed.MixedModel, "_create_and_replace", mixed.MixedModel._create_and_replace)
    monkeypatch.setattr(peft.tuners.mixed, "COMPATIBLE_TUNER_TYPES", mixed.COMPATIBLE_TUNER_TYPES)
    if gone:
        monkeypatch.delattr(mixed, gone)
    before = len(mixed.COMPATIBLE_TUNER_TYPES)
    _compat.support_mixed_models(CurloraConfig, CurloraModel, CurloraLayer)
    assert len(mixed.COMPATIBLE_TUNER_TYPES) == before + (gone is None)


@pytest.mark.parametrize("gone", [None, "CONFIG_KEYS_TO_CHECK", "hotswap_adapter_from_state_dict"])
def test_hotswapping(gone, monkeypatch):
    hotswap = peft.utils.hotswap
    called = []
    monkeypatch.setattr(hotswap, "CONFIG_KEYS_TO_CHECK", {})
    monkeypatch.setattr(hotswap, "hotswap_adapter_from_state_dict", lambda *args, **kwargs: called.append("lora"))
    if gone:
        monkeypatch.delattr(hotswap, gone)
    _compat.support_hotswapping(CurloraConfig, lambda *args: called.append("curlora"))
    if gone is None:
        assert list(hotswap.CONFIG_KEYS_TO_CHECK) == [PeftType.CURLORA]
        hotswap.hotswap_adapter_from_state_dict(nn.Module(), {}, "default", CurloraConfig())
        hotswap.hotswap_adapter_from_state_dict(nn.Module(), {}, "default", LoraConfig())
        assert called == ["curlora", "lora"]


@PRIVATE
def test_configurations_that_cannot_be_read(there, monkeypatch, tmp_path):
    curlora(llama()).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    if there:
        with pytest.raises(ValueError, match="its peft_type is None.*: it is damaged"):
            PeftModel.from_pretrained(nn.Linear(2, 2), tmp_path)
    else:
        monkeypatch.setattr(PeftConfig, "from_json_file", None)
        _compat.read_configurations(is_adapter)
        assert PeftConfig.from_json_file is None


@PRIVATE
def test_whoever_reads_a_configuration_has_its_digest_checked(there, monkeypatch, tmp_path):
    CurloraConfig(r=2).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**options, "alpha": 2.0}))
    if there:
        with pytest.raises(ValueError, match="is not the one that was saved"):
            PeftConfig.from_pretrained(tmp_path)
    else:
        monkeypatch.setattr(PeftConfig, "from_pretrained", None)
        _compat.check_digests_on_read(CurloraConfig, is_adapter)
        assert PeftConfig.from_pretrained is None


class Hook:
    execution_device = "meta"

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_where_an_offloaded_layer_runs_and_its_bias():
    layer = nn.Linear(2, 3)
    assert _compat.execution_device(layer) == torch.device("cpu")
    assert _compat.offloaded_bias(layer) is None
    layer._hf_hook = Hook()
    assert _compat.execution_device(layer) == torch.device("meta")
    assert _compat.offloaded_bias(layer) is None
    layer._hf_hook = Hook(weights_map={"bias": torch.ones(3)}, execution_device=None)
    assert torch.equal(_compat.offloaded_bias(layer), torch.ones(3))


@PRIVATE
def test_a_twin(there):
    if there:
        module = nn.Linear(2, 3)
        twin = _compat.shallow_twin(module)
        assert twin.weight is module.weight
    else:

        class Plain:
            weight = torch.ones(2)

        module = Plain()
        twin = _compat.shallow_twin(module)
    before = module.weight
    twin.weight = nn.Parameter(torch.zeros(1))
    assert module.weight is before


@PRIVATE
def test_many_copies(there, monkeypatch):
    take_away(monkeypatch, there, torch, "_foreach_copy_")
    tensors = [torch.zeros(2), torch.zeros(3)]
    _compat.copy_into(tensors, [torch.ones(2), torch.full((3,), 2.0)])
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], [2, 2, 2]]


@PRIVATE
def test_tying(there, monkeypatch):
    names = ("_add_modules_to_save_to_tie", "_add_targets_to_tie")
    take_away(monkeypatch, there, peft.tuners.lora.LoraModel, *names)
    taker = type("Taker", (), {})
    _compat.tie_like_lora(taker)
    for name in names:  # without the name, the method of every tuner remains, which warns
        warns = getattr(taker, name) is getattr(peft.tuners.tuners_utils.BaseTuner, name)
        assert warns == (not there)


def test_the_callbacks_around_one():
    class Asks(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.around = _compat.callbacks_around(self)

    asks = Asks()
    handler = CallbackHandler([DefaultFlowCallback(), asks], None, None, None, None)
    handler.on_train_begin(None, None, types.SimpleNamespace())
    assert asks.around is handler.callbacks
    assert _compat.callbacks_around(asks) is None  # not called by the Trainer


@pytest.mark.parametrize("wrapped", [True, False])
@PRIVATE
def test_another_base_rate(there, wrapped):
    U, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [U]}, {"params": [other]}], lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    if not there:
        del scheduler._last_lr
    _compat.scale_base_rate(optimizer, types.SimpleNamespace(scheduler=scheduler) if wrapped else scheduler, 0, 0.6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.1])
    if there:
        assert scheduler.get_last_lr() == pytest.approx([0.3, 0.1])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.2 / 3])


@pytest.mark.parametrize("there", [True, False])
def test_one_gpu_of_several(there):
    """A Trainer in one process would give each its share of a larger batch."""
    arguments = types.SimpleNamespace(n_gpu=4, **({"_n_gpu": 4} if there else {}))
    _compat.use_one_gpu(arguments)
    assert getattr(arguments, "_n_gpu", None) == (1 if there else None)
    alone = types.SimpleNamespace(n_gpu=0, _n_gpu=0)
    _compat.use_one_gpu(alone)
    assert alone._n_gpu == 0


def test_the_trainers_batch_is_of_one_gpu(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2  # as on a machine with two
    assert arguments.train_batch_size == 8
    _compat.use_one_gpu(arguments)
    assert arguments.train_batch_size == 4
