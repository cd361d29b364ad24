"""On quantized base models an adapter is exact: it follows the formula with the dequantized weight."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import curlora
from curlora import CurloraConfig, CurloraLayer
from curlora.sampling import squared_norms
from curlora.tuner.weight import ProbedWeight, StoredWeight, read
from tests.models import layers, llama, randomize, tokens


def int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def base(seed=0):
    """A model whose attention matters: with transformers' initial weights an adapter there changes the loss by 1e-6."""
    return llama(seed, initializer_range=0.3)


def by_hqq(model):
    """Quantize every linear layer of the model but its head with hqq."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            config = BaseQuantizeConfig(nbits=4, group_size=16)
            layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), child, layer)
    return model


# In float32, so that the compared values differ only by the adapter's rounding.
QUANTIZATIONS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    # Without outliers, since their choice depends on the rest of the batch.
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao": int8_weight_only,
    "hqq": None,  # transformers 5 cannot load hqq models, so hqq itself quantizes the model
}
# int8 also quantizes the activations, each token by itself: a sum over 32 inputs has a relative error of about 0.01.
TOLERANCE = {"int8": 0.03}


@pytest.fixture(scope="module", autouse=True)
def same_on_every_processor():
    """On CPUs with AVX512-BF16 bitsandbytes uses other kernels, which refuse layers as narrow as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantized(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)

    def load(name=request.param):
        if name == "hqq":
            return by_hqq(base())
        config = QUANTIZATIONS[name]() if name else None
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()

    load.name = request.param
    load.folder = folder
    load.tolerance = TOLERANCE.get(request.param, 1e-4)
    return load


def adapted(base, **config):
    model = get_peft_model(base, CurloraConfig(**{"r": 4, **config})).eval()
    randomize(model)
    return model


def close(found, expected, tolerance):
    return float((found - expected).norm() / expected.norm()) < tolerance


def dense(layer, adapter="default"):
    """Return the adapted layer's formula as a float64 function, with the dequantized weight."""
    with read(layer.get_base_layer()) as weight:
        everything = weight.columns(torch.arange(layer.in_features)).double()
    columns, rows = layer.basis(adapter).indices.long()
    U = layer.curlora_U[adapter].weight.detach().double()
    bias = layer.get_base_layer().bias
    changed = everything + everything[:, columns] @ U @ everything[rows, :]
    return lambda x: x.double() @ changed.T + bias.double()


def test_a_layer_is_the_formula_over_what_its_weight_stands_for(quantized):
    model = adapted(quantized())
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    for layer in layers(model):
        assert not hasattr(layer.get_base_layer(), "weight") or type(layer.get_base_layer().weight) is not nn.Parameter
        assert layer.curlora_U["default"].weight.dtype == torch.float32
        assert close(layer(x).double(), dense(layer)(x), quantized.tolerance)


def test_probing_finds_what_dequantizing_finds(quantized):
    for layer in layers(adapted(quantized())):
        base = layer.get_base_layer()
        with read(base) as stored:
            assert isinstance(stored, StoredWeight)
            probed = ProbedWeight(base, "layer")
            index, d = torch.tensor([3, 0, 3, 7]), torch.eye(base.out_features)[:5]
            for found, expected in (
                (probed.columns(index), stored.columns(index)),
                (probed.rows(index), stored.rows(index)),
                (torch.cat(probed.squared_norms()), torch.cat(stored.squared_norms())),
                (probed.input_gradient(d), stored.input_gradient(d)),
            ):
                assert close(found, expected, quantized.tolerance)


def test_training_moves_U_alone_along_the_gradient_of_the_formula(quantized):
    model = adapted(quantized())
    before = plain_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = plain_state(model)
    for name, value in before.items():
        assert torch.equal(after[name], value) == (not name.endswith("curlora_U.default.weight")), name

    layer = layers(model)[0]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(layer(x).square().sum(), layer.curlora_U["default"].weight)[0]
    expected = torch.autograd.grad(_square(layer, x), layer.curlora_U["default"].weight)[0]
    assert close(found, expected, 3 * quantized.tolerance)


def plain_state(model):
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {n: (v.dequantize() if type(v).__module__.startswith("torchao") else v).clone() for n, v in state.items()}


def _square(layer, x):
    columns, rows = layer.basis("default").indices.long()
    with read(layer.get_base_layer()) as weight:
        C, R, W = weight.columns(columns), weight.rows(rows), weight.columns(torch.arange(32))
    return (x @ (W + C @ layer.curlora_U["default"].weight @ R).T + layer.get_base_layer().bias).square().sum()


def test_saved_and_loaded_on_the_same_base(quantized, tmp_path):
    model = adapted(quantized())
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, expected)


def test_trained_on_one_precision_and_served_on_another(quantized, tmp_path):
    adapted(quantized()).save_pretrained(tmp_path / "quantized")
    with pytest.warns(UserWarning, match="another precision or quantization"):
        PeftModel.from_pretrained(quantized(None), tmp_path / "quantized")
    adapted(quantized(None)).save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="another precision or quantization"):
        PeftModel.from_pretrained(quantized(), tmp_path / "plain")


def test_another_base_is_refused(quantized, tmp_path):
    adapted(base(seed=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made on another base model"):
        PeftModel.from_pretrained(quantized(), tmp_path)


def test_merging_does_what_peft_does_for_lora_and_unmerging_gives_back_the_base(quantized, tmp_path):
    model = adapted(quantized())
    base = quantized()(tokens()).logits
    curlora.save_as_lora(tmp_path, model)
    unmerged = model(tokens()).logits
    lora = PeftModel.from_pretrained(quantized(), tmp_path).eval()

    lora.merge_adapter()
    model.merge_adapter()
    merged = model(tokens()).logits
    assert not close(merged, base, 0.01)
    others = [module for module in lora.modules() if isinstance(module, LoraLayer)]
    for ours, other in zip(layers(model), others, strict=True):
        with read(ours.get_base_layer()) as found, read(other.get_base_layer()) as expected:
            assert close(found.weight, expected.weight, 1e-4)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base)
    assert torch.equal(model(tokens()).logits, unmerged)

    model.merge_adapter(safe_merge=True)
    whole = model.merge_and_unload()
    assert not [module for module in whole.modules() if isinstance(module, CurloraLayer)]
    assert close(whole(tokens()).logits, merged, 1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_that_was_packed_for_inference_is_still_read_right(nested):
    """bitsandbytes packs weights so in the first forward pass in inference, on CPUs with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
    from bitsandbytes.nn import Linear4bit, Params4bit

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
            self.layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
            self.layer.to("cpu")

    def packed():
        alone = Alone().eval()
        layer = alone.layer
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        return alone

    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(128)
    with read(Alone().layer) as before, read(packed().layer) as after:
        assert isinstance(after, StoredWeight)
        expected = before.columns(everything)
        assert close(after.columns(everything), expected, 0.004)  # the scales are rounded to bfloat16

    config = CurloraConfig(r=4, target_modules=["layer"])
    models = [get_peft_model(make(), config).eval() for make in (Alone, packed)]
    randomize(models[0])
    first, second = (layers(model)[0] for model in models)
    second.redraw("default", first.basis("default").indices)
    second.curlora_U["default"].weight.data.copy_(first.curlora_U["default"].weight)
    for model in models:
        model.merge_adapter()
    merged = []
    for model in models:
        with read(layers(model)[0].get_base_layer()) as weight:
            merged.append(weight.columns(everything))
    assert not close(merged[0], expected, 0.1)
    assert close(merged[1], merged[0], 0.05)  # some entries are rounded in the other direction

    if has_avx512bf16():
        model = packed()
        with torch.no_grad():
            assert close(model.layer(x), x @ expected.T, 0.03)


def test_torchao_in_four_bits_by_its_own_means():
    """transformers cannot load such weights on a CPU, so torchao itself makes them. PEFT cannot merge into these."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = base()
    quantize_(model.model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
    model = adapted(model)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for layer in layers(model):
        assert type(layer.get_base_layer().weight).__module__.startswith("torchao.")
        assert close(layer(x).double(), dense(layer)(x), 1e-4)
        found = torch.autograd.grad(layer(x).square().sum(), layer.curlora_U["default"].weight)[0]
        assert close(found, torch.autograd.grad(_square(layer, x), layer.curlora_U["default"].weight)[0], 1e-3)
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        layers(model)[0].merge()
    assert torch.equal(model(tokens()).logits, before)


def test_a_refused_merge_changes_nothing(quantized):
    model = adapted(quantized())
    before = model(tokens()).logits
    layers(model)[-1].curlora_U["default"].weight.data.fill_(torch.nan)
    broken = layers(model)[-1]
    base = broken.base_layer
    with pytest.raises(ValueError, match="NaN"):
        broken.merge(safe_merge=True)
    assert broken.base_layer is base
    assert not broken.merged
    randomize(model)
    assert torch.equal(model(tokens()).logits, before)


def test_several_adapters_guard_and_export_work_as_on_any_base(quantized):
    model = adapted(quantized())
    model.add_adapter("second", CurloraConfig(r=3, seed=5))
    randomize(model, "second", seed=8)
    one, two = (_logits(model, [name]) for name in ("default", "second"))
    rows = model(tokens(), adapter_names=["default", "second"]).logits
    assert close(rows[0], one[0], 1e-5)
    assert close(rows[1], two[1], 1e-5)
    config, state = curlora.convert_to_lora(model, "default")
    assert isinstance(config, LoraConfig)
    layer = layers(model)[0]
    A, B = (state[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(B @ A, layer.get_delta_weight("default"), atol=1e-5)

    model.set_adapter("default")
    for adapter in layers(model):
        adapter.curlora_U["default"].weight.data.zero_()
    before = layer.basis("default").indices.clone()
    texts = [{"input_ids": tokens(seed=seed, length=9)} for seed in range(4)]
    curlora.redraw(model, [{"input_ids": tokens(), "labels": tokens()}], texts, progress=False)
    assert not torch.equal(layer.basis("default").indices, before)
    calibration = curlora.calibrate(model, texts, progress=False)
    assert curlora.Guard(model, calibration, budget=0.01).drift() == 0


def _logits(model, adapters):
    model.base_model.set_adapter(adapters)
    return model(tokens()).logits


class PackedLinear(nn.Module):
    """A stand-in for GPTQ's and AWQ's layers: packed integers, half-precision scales, and only a forward pass."""

    def __init__(self, linear, group=8):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        grouped = linear.weight.detach().T.reshape(-1, group, linear.out_features)
        scales = grouped.abs().amax(1, keepdim=True) / 7
        codes = (grouped / scales).round().add(8).to(torch.uint8).reshape(linear.in_features, linear.out_features)
        self.register_buffer("qweight", codes[0::2] | (codes[1::2] << 4))
        self.register_buffer("scales", scales.half())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().half())
        self.group = group

    def numbers(self):
        codes = torch.stack([self.qweight & 15, self.qweight >> 4], dim=1).flatten(0, 1).half() - 8
        return (codes.reshape(-1, self.group, self.out_features) * self.scales).flatten(0, 1).T

    def forward(self, x):
        if x.dtype != torch.float16:
            raise RuntimeError("expected float16")
        return nn.functional.linear(x, self.numbers(), self.bias)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def packed(bias=True):
    torch.manual_seed(0)
    return PackedLinear(nn.Linear(64, 48, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_layer_of_which_only_the_output_is_known(bias):
    base = packed(bias)
    W = base.numbers().float()
    model = get_peft_model(Wrapped(copy.deepcopy(base)), CurloraConfig(r=6, target_modules=["layer"]))
    layer = model.base_model.model.layer
    with read(layer.get_base_layer()) as weight:
        assert isinstance(weight, ProbedWeight)
        for found, expected in zip(weight.squared_norms(), squared_norms(W), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    columns, rows = layer.basis("default").indices.long()
    torch.testing.assert_close(layer.basis("default").factor.float(), W[:, columns], rtol=1e-2, atol=1e-3)
    randomize(model)
    U = layer.curlora_U["default"].weight
    x = torch.randn(5, 64).half()
    expected = x.float() @ (W + W[:, columns] @ U @ W[rows, :]).T + (base.bias.float() if bias else 0)
    assert close(layer(x).float(), expected, 5e-3)
    gradient = torch.autograd.grad(layer(x).float().square().sum(), U)[0]
    assert close(gradient, torch.autograd.grad(expected.square().sum(), U)[0], 1e-2)
    with pytest.raises(ValueError, match=r"'layer'.*PackedLinear"):
        model.merge_adapter()
    assert not layer.merged
    assert close(layer(x).float(), expected, 5e-3)


class Squashed(PackedLinear):
    def forward(self, x):
        return super().forward(x).tanh() * 0.3


class Shifted(PackedLinear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("kind", "message"), [(Squashed, "adds something of its own|not linear"), (Shifted, "adds something of its own")]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_layer_that_does_more_than_multiply_is_refused(kind, message, bias):
    torch.manual_seed(0)
    model = Wrapped(kind(nn.Linear(64, 48, bias=bias)))
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, CurloraConfig(r=6, target_modules=["layer"]))
    assert isinstance(model.layer, kind)
