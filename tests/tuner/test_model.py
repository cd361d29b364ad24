"""CURLoRA through PEFT's own interface, on whole models."""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from curlora import CurloraConfig, CurloraLayer, convert_to_lora
from tests.models import BASES, curlora, gpt2, layers, llama, randomize, tokens

both = pytest.mark.parametrize("base", BASES)


@both
def test_a_fresh_adapter_leaves_the_logits_bit_for_bit_alone(base):
    model = BASES[base]()
    ids = tokens()
    before = model(ids).logits
    adapted = get_peft_model(model, CurloraConfig(r=4)).eval()
    assert len(layers(adapted)) == {"llama": 6, "gpt2": 2}[base]
    assert torch.equal(adapted(ids).logits, before)


@both
@pytest.mark.parametrize("default", ["meta", torch.bfloat16, torch.float64], ids=str)
def test_what_tensors_are_by_default_does_not_matter(base, default, tmp_path):
    """Scripts make large models under ``with torch.device(...)`` or ``torch.set_default_dtype``."""
    expected = curlora(BASES[base](), target_modules="all-linear")
    expected.save_pretrained(tmp_path)
    fresh, loaded = BASES[base](), BASES[base]()
    with contextlib.ExitStack() as stack:
        if default == "meta":
            stack.enter_context(torch.device(default))
        else:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(default)
        fresh = get_peft_model(fresh, CurloraConfig(r=4, target_modules="all-linear"))
        fresh.add_adapter("second", CurloraConfig(r=4, target_modules="all-linear"))
        loaded = PeftModel.from_pretrained(loaded, tmp_path, torch_device="cpu").eval()
    for ours, theirs in zip(layers(fresh), layers(expected), strict=True):
        for adapter in ("default", "second"):
            assert torch.equal(ours.basis(adapter).indices, theirs.basis("default").indices)
            assert ours.curlora_U[adapter].weight.dtype == torch.float32
    assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


def test_weights_are_changed_exactly_whatever_the_callers_autocast():
    merged = [curlora(llama()) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        merged[0].merge_adapter()
        update = layers(merged[0])[0].get_delta_weight("default")
        lora = convert_to_lora(curlora(llama()))[1]
    merged[1].merge_adapter()
    assert torch.equal(update, layers(merged[1])[0].get_delta_weight("default"))
    for a, b in zip(merged[0].parameters(), merged[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, factor in convert_to_lora(curlora(llama()))[1].items():
        assert torch.equal(lora[name], factor)


@both
def test_only_U_is_trained_and_it_is_r_squared_per_layer(base):
    model = get_peft_model(BASES[base](), CurloraConfig(r=5))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all("curlora_U" in name for name in trained)
    assert sum(trained.values()) == 25 * len(layers(model))
    assert model.get_nb_trainable_parameters()[0] == sum(trained.values())


def test_default_targets_are_query_key_and_value():
    names = {layer.name.rpartition(".")[2] for layer in layers(curlora(llama()))}
    assert names == {"q_proj", "k_proj", "v_proj"}
    assert {layer.name.rpartition(".")[2] for layer in layers(curlora(gpt2()))} == {"c_attn"}


def test_every_architecture_of_peft_has_a_key_where_it_has_query_and_value():
    from curlora import CurloraModel

    for model_type, targets in CurloraModel.target_module_mapping.items():
        for query, key in (("q_proj", "k_proj"), ("query", "key"), ("q", "k")):
            if query in targets:
                assert key in targets, model_type


@both
def test_training_moves_the_model_and_only_U(base):
    model = get_peft_model(BASES[base](), CurloraConfig(r=4)).eval()  # eval: no dropout noise
    ids = tokens(batch=4)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@both
def test_disable_adapter_is_the_base(base):
    ids = tokens()
    expected = BASES[base]()(ids).logits
    model = curlora(BASES[base]())
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-4)


@both
def test_merge_unmerge_and_unload(base):
    ids = tokens()
    plain = BASES[base]()(ids).logits
    model = curlora(BASES[base]())
    active = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, active, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, active, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(merged(ids).logits, active, rtol=1e-4, atol=1e-5)


def test_unload_returns_the_untouched_base():
    ids = tokens()
    expected = llama()(ids).logits
    base = curlora(llama()).unload()
    assert not layers(base)
    assert torch.equal(base(ids).logits, expected)


@both
def test_several_adapters_on_one_model(base):
    ids = tokens()
    model = curlora(BASES[base]())
    first = model(ids).logits
    model.add_adapter("second", CurloraConfig(r=3, seed=1))
    assert torch.equal(model(ids).logits, first)  # the new adapter is not active
    model.set_adapter("second")
    randomize(model, "second", seed=8)
    second = model(ids).logits
    assert not torch.allclose(first, second, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.base_model.set_adapter(["default", "second"])
    together = model(ids).logits
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(merged(ids).logits, together, rtol=1e-4, atol=1e-5)


def test_deleting_an_adapter_leaves_the_other():
    ids = tokens()
    model = curlora(llama())
    model.add_adapter("second", CurloraConfig(r=3))
    randomize(model, "second")
    model.set_adapter("second")
    expected = model(ids).logits
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, expected)
    for layer in layers(model):
        assert set(layer.r) == set(layer.curlora_U.keys()) == {"second"}
        assert {name.split(".")[1] for name, _ in layer.named_buffers() if "curlora" in name} == {"second"}


def test_adapters_drawn_alike_have_the_same_indices_whatever_the_order():
    one = curlora(llama(), target_modules=["q_proj", "v_proj"])
    torch.manual_seed(123)
    other = curlora(llama(), target_modules=["v_proj", "q_proj", "down_proj"])
    draws = {layer.name: layer.basis("default").indices for layer in layers(other)}
    for layer in layers(one):
        assert torch.equal(layer.basis("default").indices, draws[layer.name])
    assert len({tuple(index.flatten().tolist()) for index in draws.values()}) == len(draws)  # layers differ


def test_patterns_and_modules_to_save():
    model = get_peft_model(
        llama(),
        CurloraConfig(
            r=4,
            target_modules=["q_proj", "up_proj", "down_proj"],
            exclude_modules=["down_proj"],
            rank_pattern={"q_proj": 6},
            alpha_pattern={"layers.1.mlp.up_proj": 0.5},
            layers_to_transform=[1],
            layers_pattern="layers",
            modules_to_save=["lm_head"],
        ),
    )
    found = {layer.name: (layer.r["default"], layer.alpha["default"]) for layer in layers(model)}
    assert found["model.layers.1.self_attn.q_proj"] == (6, 1.0)
    assert found["model.layers.1.mlp.up_proj"] == (4, 0.5)
    assert not any("down_proj" in name or "layers.0." in name for name in found)
    assert any("modules_to_save" in n and p.requires_grad for n, p in model.named_parameters())


def test_init_weights_false_starts_somewhere_else():
    base = llama()
    ids = tokens()
    before = base(ids).logits
    model = get_peft_model(base, CurloraConfig(r=4, init_weights=False, target_modules="all-linear")).eval()
    assert not torch.equal(model(ids).logits, before)


def test_half_precision_bases_train_U_in_float32():
    model = get_peft_model(llama().to(torch.bfloat16), CurloraConfig(r=4))
    layer = layers(model)[0]
    assert layer.curlora_U["default"].weight.dtype == torch.float32
    assert layer.basis("default").factor.dtype == torch.bfloat16
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert layer.curlora_U["default"].weight.grad.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tokens()
    grads = []
    for checkpointing in (False, True):
        model = curlora(llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        grads.append([layer.curlora_U["default"].weight.grad for layer in layers(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_moves_between_dtypes_with_its_adapter():
    ids = tokens()
    model = curlora(llama())
    expected = model(ids).logits
    torch.testing.assert_close(model.double()(ids).logits.float(), expected, rtol=1e-4, atol=1e-5)


def test_unknown_targets_say_what_there_is():
    base = llama()
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"query_proj.*not found.*down_proj, gate_proj, k_proj, lm_head"
    ):
        get_peft_model(base, CurloraConfig(target_modules=["query_proj"]))
    assert not layers(base)


def test_unknown_targets_of_a_second_adapter_say_what_there_is():
    model = curlora(llama())
    with pytest.raises(NoMatchingPeftModuleError, match=r"down_proj, gate_proj, k_proj, lm_head, .*, v_proj\.$") as e:
        model.add_adapter("second", CurloraConfig(target_modules=["query_proj"]))
    assert "base_layer" not in str(e.value)


def test_a_forward_pass_without_casts_of_the_input_is_the_same():
    model = curlora(llama())
    ids = tokens()
    expected = model(ids).logits
    with disable_input_dtype_casting(model):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (dict(target_modules=["q_proj", "input_layernorm"]), TypeError, "input_layernorm' is a LlamaRMSNorm"),
        (dict(target_modules=["v_proj", "q_proj"], r=20), ValueError, r"k_proj|v_proj.*r=20 is not between 1 and 16"),
    ],
)
def test_a_failed_injection_leaves_the_model_as_it_was(config, error, message):
    base = llama()
    ids = tokens()
    expected = base(ids).logits
    with pytest.raises(error, match=message):
        get_peft_model(base, CurloraConfig(**config))
    assert not layers(base)
    assert torch.equal(base(ids).logits, expected)
    get_peft_model(base, CurloraConfig(r=4))  # and it can still be adapted

    model = curlora(llama())
    expected = model(ids).logits
    with pytest.raises(error, match=message):
        model.add_adapter("bad", CurloraConfig(**config))
    assert torch.equal(model(ids).logits, expected)
    assert all(set(layer.r) == {"default"} for layer in layers(model))


@pytest.mark.parametrize("name", ["half", "a.b"])
def test_names_that_torch_cannot_hold_are_refused(name):
    model = curlora(llama())
    with pytest.raises(ValueError, match=f"cannot hold an adapter that is called '{name}'"):
        model.add_adapter(name, CurloraConfig(r=4))
    assert all(set(layer.r) == {"default"} for layer in layers(model))


def test_a_failed_injection_keeps_what_was_trainable():
    model = get_peft_model(llama(), CurloraConfig(r=4, target_modules=["q_proj"], bias="all"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(name.endswith("v_proj.bias") and trained for name, trained in before.items())
    with pytest.raises(ValueError, match="r=20"):
        model.add_adapter("bad", CurloraConfig(r=20, target_modules=["q_proj", "v_proj"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_non_finite_base_weights_name_the_layer():
    base = llama()
    base.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj.*NaN or infinite"):
        get_peft_model(base, CurloraConfig(r=4))
    assert not layers(base)


@pytest.mark.parametrize(
    "config",
    [dict(r=0), dict(r=-3), dict(r=2.5), dict(sampling="best"), dict(bias="lora_only"), dict(layers_pattern="h")],
)
def test_bad_options_are_refused_at_once(config):
    with pytest.raises(ValueError, match=f"{next(iter(config))}.*"):
        CurloraConfig(**config)


def test_counts_without_weights_on_the_meta_device():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 1024, bias=False))
    model = get_peft_model(base, CurloraConfig(r=16, target_modules=["0", "1"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 256
    assert all(isinstance(m, CurloraLayer) for m in (model.base_model.model[0], model.base_model.model[1]))


def test_bias_curlora_only_trains_the_biases_of_adapted_layers():
    model = get_peft_model(llama(), CurloraConfig(r=4, target_modules=["q_proj"], bias="curlora_only"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.endswith("bias")} == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in range(2)
    }


def test_importing_curlora_registers_it_with_peft_and_changes_nothing_else():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    member = PeftType("CURLORA")
    assert member is PeftType.CURLORA
    assert member in PeftType
    assert isinstance(member, PeftType)
    assert member == "CURLORA"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is CurloraConfig
    assert CurloraConfig().peft_type is member
    assert PeftType.LORA.value == "LORA"


def test_a_whole_step_raises_no_warning_of_ours():
    ids = tokens()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="curlora")
        model = get_peft_model(llama(), CurloraConfig(r=4))
        model(ids, labels=ids).loss.backward()
    assert isinstance(model, PeftModel)


def test_parameters_that_are_replaced_are_not_kept():
    """As FSDP and moves to the meta device replace them."""
    model = curlora(llama())
    replaced = [weakref.ref(parameter) for parameter in model.base_model.model.parameters()]
    model.to("meta")
    gc.collect()
    assert not any(parameter() is not None for parameter in replaced)
