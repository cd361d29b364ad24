"""Common uses of LoRA, with both methods: where LoRA returns the right values, CURLoRA must as well."""

import copy
import warnings

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from curlora import CurloraConfig, CurloraLayer
from curlora.tuner import weight as weight_module
from tests.models import BASES, curlora, gpt2, layers, llama, randomize, tokens

CONFIGS = {"curlora": CurloraConfig, "lora": LoraConfig}
beside = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def random(config, **options):
    """A configuration with a random start, so that the adapter changes the outputs."""
    started = {"init_weights": False} if config is CurloraConfig else {"init_lora_weights": False}
    return config(**{"r": 4, **started, **options})


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Modules that are never called


@beside
@pytest.mark.parametrize("targets", [["out_proj"], ["in_proj", "out_proj"], "all-linear"])
def test_what_mamba_reads_and_never_calls_is_refused(config, targets):
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(model, config(r=2, target_modules=targets))
    if config is CurloraConfig:
        assert [name for name, _ in model.named_modules()] == before


def test_a_hybrid_is_known_by_its_blocks():
    class SomeMambaMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="'out_proj' of a SomeMambaMixer is incompatible"):
        get_peft_model(nn.Sequential(SomeMambaMixer()), CurloraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_are_refused_with_a_sentence(kind):
    model = nn.Sequential(kind(4, 4, 3))
    with pytest.raises(TypeError, match=r"'0' is a Conv.d, which is not supported: its kernel is not a matrix"):
        get_peft_model(model, CurloraConfig(r=2, target_modules=["0"]))


# Which layers are adapted


@beside
@pytest.mark.parametrize("targets", [".*q_proj", "all-linear"])
@pytest.mark.parametrize(
    "option",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": []},
        {"layers_pattern": []},
    ],
)
def test_layers_to_transform_with_a_string_is_refused(config, targets, option):
    with pytest.raises(ValueError, match="target_modules"):
        config(target_modules=targets, **option)


@beside
def test_layers_to_transform_with_names(config):
    model = get_peft_model(llama(), config(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    found = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert found == ["base_model.model.model.layers.1.self_attn.q_proj"]


def qwen2_moe():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def test_all_linear_lowers_the_rank_of_small_layers_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"rank was lowered from 16 .* 2 layer\(s\): .*shared_expert_gate \(1\)"):
        model = get_peft_model(qwen2_moe(), CurloraConfig(r=16, target_modules="all-linear")).eval()
    ranks = {layer.name: layer.r["default"] for layer in layers(model)}
    assert {r for name, r in ranks.items() if name.endswith("shared_expert_gate")} == {1}
    assert {r for name, r in ranks.items() if not name.endswith(("shared_expert_gate", "gate.weight"))} == {16}
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(qwen2_moe(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_rank_above_a_layer_that_was_named_is_refused():
    with pytest.raises(ValueError, match="r=16"):
        get_peft_model(qwen2_moe(), CurloraConfig(r=16, target_modules=["shared_expert_gate"]))


def gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=100, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_up_proj"]])
def test_experts_that_are_left_out_are_named(targets):
    with pytest.warns(UserWarning, match=r"down_proj, .*gate_up_proj.* are left out .*target_parameters"):
        get_peft_model(gpt_oss(), CurloraConfig(r=2, target_modules=targets))


def test_attention_alone_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out.*")
        get_peft_model(gpt_oss(), CurloraConfig(r=2, target_modules=["q_proj"]))


# Other methods on the same layers


@beside
def test_on_top_of_another_method_forward_and_merge_agree(config):
    inner = get_peft_model(llama(), LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    model = get_peft_model(inner, random(config, target_modules=["q_proj"])).eval()
    before = model(tokens()).logits
    model.merge_adapter()
    close(model(tokens()).logits, before)
    model.unmerge_adapter()
    close(model(tokens()).logits, before)


def test_on_top_of_another_method_the_layer_is_the_formula():
    inner = get_peft_model(llama(), LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    model = get_peft_model(inner, random(CurloraConfig, target_modules=["q_proj"])).eval()
    layer = layers(model)[0]
    base = layer.get_base_layer()
    W, basis = base.weight.double(), layer.basis("default")
    columns, rows = basis.indices.long()
    delta = W[:, columns] @ layer.curlora_U["default"].weight.double() @ W[rows]
    loha = layer.base_layer.get_delta_weight("default").double()
    x = torch.randn(5, 32, dtype=torch.float32)
    close(layer(x).double(), x.double() @ (W + loha + delta).T + base.bias.double())


@beside
def test_under_another_method_both_act(config):
    model = get_peft_model(llama(), random(config, target_modules=["q_proj"]))
    model = get_peft_model(model, LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"])).eval()
    layer = next(module for module in model.modules() if hasattr(module, "hada_w1_a"))
    x = torch.randn(3, 32)
    inner = layer.base_layer
    close(layer(x), inner(x) + x @ layer.get_delta_weight("default").T)


def test_a_weight_that_another_method_has_changed_is_not_merged_into():
    model = get_peft_model(llama(), random(CurloraConfig, target_modules=["q_proj"]))
    layers(model)[0].get_base_layer().weight.data += 0.1
    with pytest.raises(RuntimeError, match="weight has changed since adapter 'default' was put on it"):
        model.merge_adapter()


@beside
def test_a_mixed_model(config, tmp_path):
    plain = llama()(tokens()).logits
    model = get_peft_model(llama(), random(config, target_modules=["q_proj", "v_proj"]), "one", mixed=True).eval()
    alone = model(tokens()).logits
    model.add_adapter("two", LoHaConfig(r=2, init_weights=False, target_modules=["q_proj", "up_proj"]))
    model.set_adapter(["one", "two"])
    together = model(tokens()).logits
    assert not torch.allclose(together, alone, atol=1e-4)
    model.set_adapter("one")
    assert torch.equal(model(tokens()).logits, alone)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, plain)
    model.set_adapter(["one", "two"])
    close(model.merge_and_unload()(tokens()).logits, together)


# Scales


@beside
def test_scales(config):
    model = get_peft_model(llama(), random(config, target_modules=["q_proj"])).eval()
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    x = torch.randn(3, 32)
    base = layer.base_layer(x)
    full = layer(x) - base

    def share():
        return (layer(x) - base).norm() / full.norm()

    layer.set_scale("default", 0.5)
    close(share(), torch.tensor(0.5))
    layer.set_scale("of no layer here", 0.5)
    layer.scale_layer(3)
    close(share(), torch.tensor(1.5))
    layer.unscale_layer(2)
    close(share(), torch.tensor(0.75))
    layer.unscale_layer()
    close(share(), torch.tensor(1.0))


def test_a_scale_goes_into_a_merge_and_not_into_the_file(tmp_path):
    model = curlora(llama())
    unscaled = model(tokens()).logits
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    scaled = model(tokens()).logits
    model.save_pretrained(tmp_path)
    close(model.merge_and_unload()(tokens()).logits, scaled)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path).eval()(tokens()).logits, unscaled)


# Transforms of torch.func


@beside
@both
def test_per_example_gradients(config, base):
    targets = ["q_proj", "c_attn"]
    model = get_peft_model(base(), random(config, target_modules=targets)).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    ids = tokens(batch=3)

    def loss(parameters, row):
        return functional_call(
            model, {**parameters, **rest}, args=(row[None],), kwargs={"use_cache": False}
        ).logits.sum()

    by_row = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(row[None], use_cache=False).logits.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                close(by_row[name][i], parameter.grad, 1e-3)


# Loading


def test_low_memory_injection_reads_no_weight(monkeypatch):
    saved = get_peft_model_state_dict(curlora(llama()))
    reads = []
    monkeypatch.setattr(weight_module, "_dense", lambda layer: reads.append(layer))
    model = inject_adapter_in_model(CurloraConfig(r=4), llama(), low_cpu_mem_usage=True)
    assert not reads
    of_adapter = [t for name, t in (*model.named_parameters(), *model.named_buffers()) if "curlora_" in name]
    assert of_adapter
    assert all(tensor.is_meta for tensor in of_adapter)
    monkeypatch.undo()
    set_peft_model_state_dict(model, saved, low_cpu_mem_usage=True)
    assert torch.equal(model.eval()(tokens()).logits, curlora(llama())(tokens()).logits)


@both
def test_a_refused_load_leaves_the_base_as_it_was(base, tmp_path):
    curlora(base(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    other = base(seed=1).requires_grad_(True)
    other.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in other.named_parameters()}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"made on another base model.*The model is as it was\."):
            PeftModel.from_pretrained(other, tmp_path)
        after = {name: (p.requires_grad, p.detach()) for name, p in other.named_parameters()}
        assert before.keys() == after.keys()
        for name, (trained, value) in after.items():
            assert trained == before[name][0]
            assert torch.equal(value, before[name][1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Already found")  # no trace of the first try
        get_peft_model(other, CurloraConfig(r=2))


def test_a_refused_further_adapter_leaves_the_others(tmp_path):
    curlora(llama(seed=1)).save_pretrained(tmp_path)
    model = curlora(llama())
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(tokens()).logits, before)
    curlora(llama(), seed=5).save_pretrained(tmp_path / "fits")
    model.load_adapter(tmp_path / "fits", "second")


@beside
def test_hotswapping(config, tmp_path):
    targets = {"target_modules": ["q_proj", "v_proj"]}
    first = get_peft_model(llama(), random(config, **targets)).eval()
    options = {"alpha": 3.0, "seed": 2} if config is CurloraConfig else {"r": 4}
    torch.manual_seed(5)
    second = get_peft_model(llama(), random(config, **targets, **options)).eval()
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(first(tokens()).logits, second(tokens()).logits)


def test_hotswapping_an_adapter_of_fewer_layers(tmp_path):
    first = curlora(llama(), target_modules=["q_proj", "v_proj"])
    second = curlora(llama(), seed=5, target_modules=["q_proj"])
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device="cpu")
    close(first(tokens()).logits, second(tokens()).logits)


def test_preparing_for_hotswapping_says_that_nothing_is_to_be_prepared():
    with pytest.raises(ValueError, match="need no preparing"):
        hotswap.prepare_model_for_compiled_hotswap(curlora(llama()), target_rank=8)


def test_what_a_layer_says_of_its_adapters_is_not_written_to():
    layer = layers(curlora(llama()))[0]
    with pytest.raises(TypeError):
        layer.scaling["default"] = 0.5


def test_hotswapping_refuses_an_adapter_of_another_base(tmp_path):
    first = curlora(llama())
    before = first(tokens()).logits
    curlora(llama(seed=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(first(tokens()).logits, before)


# Saving


def test_a_pickle_is_refused_while_saving(tmp_path):
    with pytest.raises(ValueError, match="cannot be saved as a pickle"):
        curlora(llama()).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def test_a_state_dict_of_parameters_alone_is_completed(tmp_path):
    model = curlora(llama())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path, state_dict=parameters)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_state_dict_that_lacks_a_U_is_refused_while_saving(tmp_path):
    model = curlora(llama())
    parameters = {name: p for name, p in list(model.named_parameters()) if p.requires_grad}
    parameters.popitem()
    with pytest.raises(ValueError, match="state dict that is to be saved lacks .*v_proj.curlora_U.default.weight"):
        model.save_pretrained(tmp_path, state_dict=parameters)


# Embeddings and tied weights


@both
def test_an_embedding_is_the_formula(base):
    model = curlora(base(), target_modules=["embed_tokens", "wte"])
    (layer,) = layers(model)
    W, basis = layer.get_base_layer().weight.double(), layer.basis("default")
    columns, rows = basis.indices.long()
    changed = W + W[:, columns] @ layer.curlora_U["default"].weight.double() @ W[rows]
    close(layer(tokens()).double(), changed[tokens()])
    before = model(tokens()).logits
    model(tokens(), labels=tokens()).loss.backward()
    assert layer.curlora_U["default"].weight.grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    close(merged(tokens()).logits, before)


def tied_llama():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
@pytest.mark.filterwarnings("ignore")
def test_merging_into_one_of_two_tied_weights_unties_them(targets, tmp_path):
    model = curlora(tied_llama(), target_modules=targets)
    before = model(tokens()).logits
    merged = model.merge_and_unload()
    close(merged(tokens()).logits, before)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(tokens()).logits, before)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_merging_an_inactive_adapter_unties_its_layers_and_no_other(unload):
    model = curlora(tied_llama(), target_modules=["q_proj"], adapter_name="active")
    model.add_adapter("named", CurloraConfig(r=4, target_modules=["lm_head"]))
    randomize(model, "named")
    model.base_model.set_adapter("named")
    expected = model(tokens()).logits
    model.base_model.set_adapter("active")
    head, embedding = model.get_base_model().lm_head, model.get_input_embeddings()
    before = embedding.weight.clone()
    model.merge_adapter(adapter_names=["active"])
    assert head.get_base_layer().weight is embedding.weight
    model.unmerge_adapter()
    if unload:
        close(model.merge_and_unload(adapter_names=["named"])(tokens()).logits, expected)
    else:
        model.merge_adapter(adapter_names=["named"])
    assert torch.equal(embedding.weight, before)


@pytest.mark.filterwarnings("ignore")
def test_tied_adapters_are_one(tmp_path):
    model = get_peft_model(
        tied_llama(), CurloraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True)
    ).eval()
    embedding, head = (model.base_model.model.model.embed_tokens, model.base_model.model.lm_head)
    assert isinstance(head, CurloraLayer)
    assert head.curlora_U["default"].weight is embedding.curlora_U["default"].weight
    randomize(model)
    close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    x = torch.randn(2, 32)
    close(head(x), x @ (head.get_base_layer().weight + head.get_delta_weight("default")).T)
    before = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied_llama(), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, before)


# Dropout, and custom layers


def test_dropout_zeroes_entries_of_R_x_in_training_alone():
    model = get_peft_model(llama(), random(CurloraConfig, target_modules=["q_proj"], curlora_dropout=0.5))
    layer = layers(model)[0]
    x = torch.randn(2000, 32)
    model.eval()
    update = layer(x) - layer.base_layer(x)
    basis, U = layer.basis("default"), layer.curlora_U["default"].weight
    z = x @ layer.get_base_layer().weight[basis.indices[1].long()].T
    close(update, z @ U.T @ basis.factor.T, 1e-4)
    model.train()
    torch.manual_seed(0)
    dropped = layer(x) - layer.base_layer(x)
    torch.manual_seed(0)
    close(dropped, torch.nn.functional.dropout(z, 0.5) @ U.T @ basis.factor.T, 1e-4)
    dropped.sum().backward()
    assert layer.curlora_U["default"].weight.grad.abs().sum() > 0


def test_a_layer_of_ones_own():
    from curlora.tuner.linear import CurloraLinear

    class Own(CurloraLinear):
        pass

    class Special(nn.Linear):
        pass

    config = CurloraConfig(r=2, target_modules=["0", "1"])
    config._register_custom_module({Special: Own})
    model = get_peft_model(nn.Sequential(Special(4, 4), nn.Linear(4, 4)), config)
    assert [type(layer) for layer in layers(model)] == [Own, CurloraLinear]


def test_a_copy_of_a_model_is_independent():
    model = curlora(gpt2())
    other = copy.deepcopy(model)
    before = model(tokens()).logits
    for layer in layers(other):
        layer.curlora_U["default"].weight.data.zero_()
    assert torch.equal(model(tokens()).logits, before)
    assert torch.equal(other(tokens()).logits, gpt2()(tokens()).logits)
