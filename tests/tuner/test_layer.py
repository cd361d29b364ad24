"""An adapted layer against the dense formula, in every mode a layer can be in."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from curlora import CurloraConfig
from curlora.tuner import merging
from curlora.tuner.linear import CurloraLinear
from tests.models import curlora, layers, llama


def make_base(kind="linear", bias=True, inputs=12, outputs=9, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "linear":
        base = nn.Linear(inputs, outputs, bias=bias)
    else:
        base = Conv1D(outputs, inputs)
        nn.init.normal_(base.weight)
        nn.init.normal_(base.bias)
    return base.to(dtype).requires_grad_(False)


def make_layer(base, adapters=("default",), **config):
    layer = CurloraLinear(base, "layer")
    layer.set_adapter(list(adapters))
    for i, adapter in enumerate(adapters):
        layer.update_layer(adapter, CurloraConfig(**{"r": 4, "seed": i, **config}))
        nn.init.normal_(layer.curlora_U[adapter].weight, std=0.5)
    layer.set_adapter(list(adapters))
    return layer


def dense(layer, adapters=("default",), dtype=torch.float64):
    """Return the base layer with weight ``W + sum of alpha W[:, columns] U W[rows, :]``, in float64."""
    base = copy.deepcopy(layer.get_base_layer()).to(dtype)
    W = base.weight.data.clone()
    for adapter in adapters:
        columns, rows = layer.basis(adapter).indices.long()
        U = layer.curlora_U[adapter].weight.detach().to(dtype)
        base.weight.data += layer.alpha[adapter] * W[:, columns] @ U @ W[rows, :]
    return base


KINDS = [("linear", True), ("linear", False), ("conv1d", True)]


@pytest.mark.parametrize(("kind", "bias"), KINDS)
@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("config", [{}, {"alpha": 2.5}, {"replacement": True, "r": 9}, {"sampling": "reference"}])
def test_layer_is_the_dense_formula(kind, bias, lead, config):
    layer = make_layer(make_base(kind, bias), **config)
    if config.get("replacement"):
        assert any(len(set(index.tolist())) < 9 for index in layer.basis("default").indices)  # duplicates occur
    x = torch.randn(*lead, 12)
    expected = dense(layer)(x.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_gradients_are_those_of_the_dense_formula(kind, bias):
    layer = make_layer(make_base(kind, bias, dtype=torch.float64), replacement=True, alpha=1.5)
    columns, rows = layer.basis("default").indices.long()
    base, W = layer.get_base_layer(), layer.get_base_layer().weight
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    U = layer.curlora_U["default"].weight
    weights = torch.randn(6, 9, dtype=torch.float64)
    got = torch.autograd.grad((layer(x) * weights).sum(), [x, U])

    changed = W + 1.5 * W[:, columns] @ U @ W[rows, :]
    out = x @ changed if kind == "conv1d" else x @ changed.T
    out = out if base.bias is None else out + base.bias
    expected = torch.autograd.grad((out * weights).sum(), [x, U])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradcheck_through_the_layer(kind):
    layer = make_layer(make_base(kind, dtype=torch.float64), r=3)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)

    def f(x, U):
        return torch.func.functional_call(layer, {"curlora_U.default.weight": U}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.curlora_U["default"].weight.detach().requires_grad_()))


def test_a_trained_bias_gets_its_full_gradient():
    layer = make_layer(make_base(dtype=torch.float64))
    bias = layer.get_base_layer().bias.requires_grad_()
    x = torch.randn(6, 12, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x).square().sum(), bias)
    reference = dense(layer)
    reference.bias.requires_grad_()
    (expected,) = torch.autograd.grad(reference(x).square().sum(), reference.bias)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_several_active_adapters_add_up(kind):
    layer = make_layer(make_base(kind, dtype=torch.float64), adapters=("a", "b", "c"), alpha=0.7)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, ("a", "b", "c"))(x))
    layer.set_adapter(["b"])
    torch.testing.assert_close(layer(x), dense(layer, ("b",))(x))
    layer.set_adapter([])
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(kind, safe):
    layer = make_layer(make_base(kind), adapters=("a", "b"))
    original = layer.get_base_layer().weight.clone()
    x = torch.randn(5, 12)
    active = layer(x)
    layer.merge(safe_merge=safe)
    assert layer.merged_adapters == ["a", "b"]
    torch.testing.assert_close(layer.get_base_layer().weight, dense_from(original, layer).float())
    torch.testing.assert_close(layer(x), active, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)
    torch.testing.assert_close(layer(x), active, rtol=1e-4, atol=1e-5)


def dense_from(weight, layer):
    W = weight.double()
    total = W.clone()
    for adapter in layer.merged_adapters:
        columns, rows = layer.basis(adapter).indices.long()
        total += layer.alpha[adapter] * W[:, columns] @ layer.curlora_U[adapter].weight.detach().double() @ W[rows, :]
    return total


def test_adapters_merged_one_by_one_use_the_original_weight():
    layer = make_layer(make_base(), adapters=("a", "b"))
    original = layer.get_base_layer().weight.clone()
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    torch.testing.assert_close(layer.get_base_layer().weight, dense_from(original, layer).float())


def test_unmerging_after_U_changed_restores_the_base():
    layer = make_layer(make_base())
    original = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.curlora_U["default"].weight.data.zero_()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)


@pytest.mark.parametrize("merged", [False, True])
def test_a_merge_that_runs_out_of_memory_changes_nothing(merged, monkeypatch):
    layer = make_layer(make_base(), adapters=("a", "b", "c"))
    if merged:
        layer.merge(adapter_names=["a"])
    before, calls = layer.get_base_layer().weight.clone(), []

    def add(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return added(*arguments)

    added = merging._add_product
    monkeypatch.setattr(merging, "_add_product", add)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that another adapter is merged additionally
        with pytest.raises(torch.OutOfMemoryError):
            layer.merge(adapter_names=["b", "c"])
    monkeypatch.undo()
    assert layer.merged_adapters == (["a"] if merged else [])
    assert torch.equal(layer.get_base_layer().weight, before)
    if merged:
        layer.unmerge()
        assert not layer.merged


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_unmerging_after_a_cast_gives_the_base_cast(cast):
    layer = make_layer(make_base())
    original = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.to(cast)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original.to(cast))


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e38])
def test_unmerging_an_adapter_that_is_not_finite_restores_the_base(cast, broken):
    layer = make_layer(make_base(), adapters=("a", "b"))
    original = layer.get_base_layer().weight.clone()
    layer.curlora_U["a"].weight.data[0, 0] = broken
    layer.merge()
    layer.to(cast)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original.to(cast))


def test_safe_merge_refuses_nan_and_changes_nothing():
    layer = make_layer(make_base())
    original = layer.get_base_layer().weight.clone()
    layer.curlora_U["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected.*default.*'layer'"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.get_base_layer().weight, original)


def test_a_refused_second_merge_keeps_the_first():
    layer = make_layer(make_base(), adapters=("a", "b"))
    layer.merge(adapter_names=["a"])
    merged = layer.get_base_layer().weight.clone()
    layer.curlora_U["b"].weight.data.fill_(torch.nan)
    with (
        pytest.warns(UserWarning, match="additionally"),
        pytest.raises(ValueError, match="adapter b seems to be broken"),
    ):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert layer.merged_adapters == ["a"]
    assert torch.equal(layer.get_base_layer().weight, merged)


def test_nothing_is_merged_into_weights_that_deepspeed_has_partitioned(monkeypatch):
    layer = make_layer(make_base())
    monkeypatch.setattr("curlora.tuner.merging.check_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match=r"'layer'.*ZeRO-3.*Save the adapter"):
        layer.merge()
    assert not layer.merged


def test_the_projection_inside_multihead_attention_is_refused():
    with pytest.raises(TypeError, match="'out_proj' is the output projection of a torch.nn.MultiheadAttention"):
        CurloraLinear(nn.MultiheadAttention(8, 2).out_proj, "out_proj")


def test_disabled_and_merged_layers_are_the_base():
    layer = make_layer(make_base())
    x = torch.randn(5, 12)
    expected = layer.get_base_layer()(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged


def test_no_adapter_is_drawn_from_a_merged_weight():
    layer = make_layer(make_base())
    layer.merge()
    with pytest.raises(RuntimeError, match=r"cannot add adapter 'b' while \['default'\] is merged.*Unmerge first"):
        layer.update_layer("b", CurloraConfig(r=2))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_bfloat16_base_with_float32_U(kind):
    layer = make_layer(make_base(kind, inputs=64, outputs=48, dtype=torch.bfloat16))
    layer.curlora_U["default"].weight = nn.Parameter(layer.curlora_U["default"].weight.detach().float())
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = dense(layer)(x.detach().double())
    assert (y.double() - expected).norm() / expected.norm() < 1e-2
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.curlora_U["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast_follows_the_base_layer(kind):
    layer = make_layer(make_base(kind, inputs=64, outputs=48))
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = dense(layer)(x.detach().double())
    assert (y.double() - expected).norm() / expected.norm() < 1e-2
    y.float().sum().backward()
    U = layer.curlora_U["default"].weight
    assert U.grad.dtype == torch.float32
    (reference,) = torch.autograd.grad(layer(x).sum(), U)
    assert (U.grad - reference).norm() / reference.norm() < 2e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    layer = make_layer(make_base())
    x = torch.randn(5, 12, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.curlora_U["default"].weight])
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(layer.curlora_U["default"].weight.grad, plain[1])


def test_a_training_step_saves_z_and_neither_input_nor_output():
    tokens, r = 200, 4
    layer = make_layer(make_base(inputs=60, outputs=50), r=r)
    x = torch.randn(tokens, 60, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    with_tokens = [tuple(t.shape) for t in saved if tokens in t.shape]
    assert with_tokens == [(tokens, r)]
    weights = {layer.get_base_layer().weight.data_ptr()}
    assert all(t.numel() <= 50 * r for t in saved if t.data_ptr() not in weights and tokens not in t.shape)


def test_compiles_without_a_graph_break():
    layer = make_layer(make_base())
    x = torch.randn(5, 12, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    got = torch.autograd.grad(y.square().sum(), [x, layer.curlora_U["default"].weight])
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.curlora_U["default"].weight])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_replica_that_holds_U_as_an_attribute():
    """``nn.DataParallel`` makes such replicas. transformers' Trainer uses it by default if it sees several GPUs."""
    layer = make_layer(make_base())
    x = torch.randn(3, 12)
    expected = layer(x)
    replica = replicated(layer)
    assert not list(replica.parameters())
    replica(x).sum().backward()
    assert layer.curlora_U["default"].weight.grad.any()
    torch.testing.assert_close(replica(x), expected)


def replicated(network):
    """Replicate like :func:`torch.nn.parallel.replicate`, which needs several GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer.clone())
    return replicas[network]


def test_U_is_asked_for_as_an_item():
    """DeepSpeed's ZeRO-3 gives each module a dictionary that gathers a parameter when it is looked up."""

    class Gathering(dict):
        def __getitem__(self, name):
            return whole[name] if name in whole else super().__getitem__(name)

    layer = make_layer(make_base())
    x = torch.randn(3, 12)
    expected = layer(x)
    U = layer.curlora_U["default"]
    whole = dict(U._parameters)
    empty = {name: nn.Parameter(torch.empty(0)) for name in whole}
    U._parameters = Gathering(empty)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("tokens", [31, 32, 1821])  # backward pads the factor from 32 tokens on
def test_few_and_many_tokens_are_the_dense_formula(tokens):
    layer = make_layer(make_base())
    x, by_formula = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True), dense(layer)
    (expected,) = torch.autograd.grad(by_formula(x).square().sum(), x)
    result = layer(x.float() * 1)
    torch.testing.assert_close(result.double(), by_formula(x), rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(result.double().square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_deepcopy_is_independent():
    layer = make_layer(make_base())
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 12)
    assert torch.equal(twin(x), layer(x))
    twin.curlora_U["default"].weight.data.zero_()
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 1), nn.LayerNorm(4)])
def test_unsupported_layers_are_named(module):
    with pytest.raises(TypeError, match=f"'wte' is a {type(module).__name__}, which is not supported"):
        CurloraLinear(module, "wte")


def test_a_weight_that_cannot_be_read_is_refused_clearly():
    base = nn.Linear(8, 8)
    base.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"'layer' is a Linear whose weight cannot be read.*exclude_modules"):
        make_layer(base)


def test_ranks_and_factors_by_adapter_are_as_they_are_now():
    model = curlora(llama(), alpha=1.5)
    layer = layers(model)[0]
    ranks, scaling = layer.r, layer.scaling
    assert (dict(ranks), dict(scaling), dict(layer.alpha)) == ({"default": 4}, {"default": 1.5}, {"default": 1.5})
    model.add_adapter("second", CurloraConfig(r=3))
    layer.set_scale("second", 2.0)
    assert (dict(ranks), dict(scaling)) == ({"default": 4, "second": 3}, {"default": 1.5, "second": 2.0})
    model.delete_adapter("second")
    assert "second" not in ranks
    assert repr(ranks) == "{'default': 4}"
