"""Experts that are stored as one three-dimensional parameter: each has its own ``W + alpha C U R``."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from curlora import CurloraConfig, ForgettingBudget, Guard, calibrate, convert_to_lora, redraw, save_as_lora
from curlora.errors import GuardError
from curlora.inspection import inspect_adapter
from curlora.tuner.param_wrapper import ParamWrapper
from tests.models import layers, randomize, tokens

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts_per_tok=2, initializer_range=0.2,
)  # fmt: skip


def qwen3(experts=4):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, head_dim=8, num_experts=experts)
    return Qwen3MoeForCausalLM(config).eval()


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


def gpt_oss():
    """A model that stores its experts transposed, as ``(in_features, out_features)``."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)).eval()


NAMED = {
    "qwen3": (qwen3, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "qwen3 all linear": (qwen3, {"target_modules": "all-linear"}),
    "mixtral all linear": (mixtral, {"target_modules": "all-linear"}),
    "parameters": (qwen3, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "gpt-oss": (
        gpt_oss,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}
every = pytest.mark.parametrize(("base", "targets"), NAMED.values(), ids=NAMED)


def adapted(base, targets, **options):
    model = get_peft_model(base(), CurloraConfig(r=3, **targets, **options)).eval()
    randomize(model)
    return model


def wrappers(model):
    return [layer for layer in layers(model) if isinstance(layer, ParamWrapper)]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every
def test_the_same_layers_and_parameters_are_adapted_as_by_lora(base, targets):
    def found(config, prefix):
        model = get_peft_model(base(), config)
        return {name.split(f".{prefix}")[0] for name, _ in model.named_parameters() if f".{prefix}" in name}

    assert found(CurloraConfig(r=3, **targets), "curlora_U") == found(LoraConfig(r=3, **targets), "lora_")


@every
def test_each_expert_is_the_formula(base, targets):
    model = adapted(base, targets, alpha=1.5)
    expected = base()
    for layer in layers(model):
        name = layer.name if isinstance(layer, ParamWrapper) else f"{layer.name}.weight"
        weight = expected.get_parameter(name)
        W, U = weight.detach().double(), layer.curlora_U["default"].weight.detach().double()
        indices = layer.basis("default").indices.long()
        if W.ndim == 2:
            weight.data += (1.5 * W[:, indices[0]] @ U @ W[indices[1]]).float()
        for e in range(len(W) if W.ndim == 3 else 0):
            columns, rows = indices[e]
            weight.data[e] += (1.5 * W[e][:, columns] @ U[e] @ W[e][rows]).float()
    close(model(tokens()).logits, expected(tokens()).logits)
    assert not torch.allclose(model(tokens()).logits, base()(tokens()).logits, atol=1e-4)


@every
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_loaded(base, targets, low_memory, tmp_path):
    model = adapted(base, targets)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@every
def test_merged_disabled_and_beside_another(base, targets):
    model = adapted(base, targets)
    first = model(tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base()(tokens()).logits)
    model.merge_adapter()
    close(model(tokens()).logits, first)
    model.unmerge_adapter()
    assert torch.equal(model(tokens()).logits, first)
    model.add_adapter("second", CurloraConfig(r=2, seed=1, **targets))
    randomize(model, "second")
    model.set_adapter("second")
    second = model(tokens()).logits
    assert not torch.allclose(second, first, atol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    both = model(tokens()).logits
    close(model.merge_and_unload()(tokens()).logits, both)


@every
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_trained(base, targets, implementation):
    model = get_peft_model(base(), CurloraConfig(r=3, **targets))
    model.get_base_model().set_experts_implementation(implementation)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    ids = tokens(batch=4, length=12)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        if not losses:
            unmoved = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
            assert not unmoved
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_gradients_are_those_of_the_formula():
    model = adapted(qwen3, NAMED["parameters"][1])
    layer = wrappers(model)[0]
    module, U = layer.get_base_layer(), layer.curlora_U["default"].weight
    W, basis = module.gate_up_proj.detach(), layer.basis("default")
    x = torch.randn(6, 32)
    which, weights = torch.tensor([[0, 1], [1, 3]] * 3), torch.rand(6, 2)
    layer(x, which, weights).square().sum().backward()
    found = U.grad.clone()
    V = U.detach().double().requires_grad_()
    changed = W.double() + basis.factor.double() @ V @ basis.reader.double()
    expected = torch.zeros(6, 32, dtype=torch.float64)
    for token in range(6):
        for slot in range(2):
            e = which[token, slot]
            gate, up = (changed[e] @ x[token].double()).chunk(2)
            out = module.down_proj[e].double() @ (torch.nn.functional.silu(gate) * up)
            expected[token] = expected[token] + weights[token, slot] * out
    expected.square().sum().backward()
    close(found.double(), V.grad, 1e-4)
    assert not found[2].any()  # expert 2 gets no token


@every
def test_converted_to_lora_exactly(base, targets, tmp_path):
    model = adapted(base, targets, alpha=0.7)
    save_as_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    close(loaded(tokens()).logits, model(tokens()).logits)
    model.add_adapter("second", CurloraConfig(r=2, seed=1, **targets))
    randomize(model, "second")
    model.base_model.set_adapter(["default", "second"])
    config, _ = convert_to_lora(model)
    assert config.r == 5


def test_tied_experts_and_rows_of_a_batch_are_refused():
    model = adapted(*NAMED["qwen3"])
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(tokens(), adapter_names=["default", "__base__"])


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"curlora_dropout=0\.1 cannot be applied to the parameter"):
        adapted(qwen3, NAMED["parameters"][1], curlora_dropout=0.1)


def test_other_parameters_than_those_of_another_adapter_are_refused():
    model = adapted(qwen3, NAMED["parameters"][1])
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("second", CurloraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))


# The guard


def rows(count=40):
    return list(torch.randint(0, 100, (count, 12), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def guarded():
    model = get_peft_model(qwen3(), CurloraConfig(r=3, **NAMED["qwen3"][1]))
    return model, calibrate(model, rows(), progress=False)


@pytest.mark.filterwarnings("ignore:The guard's text")
def test_moments_of_experts_are_of_the_gradient_of_each_row(guarded, monkeypatch):
    model, calibration = guarded
    from curlora.text import model_pass

    drawn = []
    draw = model_pass._drawn_gradient
    monkeypatch.setattr(model_pass, "_drawn_gradient", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    calibrate(model, rows(), progress=False)
    sums = {layer.name: 0 for layer in wrappers(model)}
    for row, gradient in zip(sorted(rows(), key=len), drawn, strict=True):
        model.zero_grad()
        model.eval()(row[None]).logits.backward(gradient)
        for layer in wrappers(model):
            G = layer.curlora_U["default"].weight.grad.double()
            sums[layer.name] = sums[layer.name] + G @ G.mT
    for name, total in sums.items():
        close(calibration.layers[name].left * 40 * 11, total, 1e-4)


@pytest.mark.filterwarnings("ignore:The guard's text")
def test_batches_give_the_moments_that_rows_give(guarded):
    model, calibration = guarded
    batch = {"input_ids": torch.stack(rows())}
    again = calibrate(model, [batch], progress=False)
    for name, moments in calibration.layers.items():
        close(again.layers[name].left, moments.left, 1e-6)
    assert again.state_dict().keys() == calibration.from_state_dict(calibration.state_dict()).state_dict().keys()


@pytest.mark.filterwarnings("ignore:The guard's text")
def test_a_guarded_step_stays_within_its_budget(guarded):
    model, calibration = guarded
    guard = Guard(model, calibration, budget=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    guard.attach(optimizer)
    ids = tokens(batch=4, length=12)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert guard.drift() <= 1e-4 * (1 + 1e-3)
    assert all(layer.curlora_U["default"].weight.any() for layer in wrappers(model))


@pytest.mark.filterwarnings("ignore:The guard's text")
def test_an_expert_that_sees_no_token_is_left_untrained_and_said_so():
    model = get_peft_model(qwen3(experts=5), CurloraConfig(r=3, init_weights=False, **NAMED["qwen3"][1]))
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":  # of the logits a, -a, b, -b and 0, 0 is never in the top two
            a, b = module.weight.data[:2].clone()
            module.weight.data.copy_(torch.stack([a, -a, b, -b, torch.zeros_like(a)]))
    calibration = calibrate(model, rows(), progress=False)
    unused = {name: moments.left.flatten(1).sum(1) == 0 for name, moments in calibration.layers.items()
              if moments.left.ndim == 3}  # fmt: skip
    assert all(mask.tolist() == [False] * 4 + [True] for mask in unused.values())
    with pytest.warns(UserWarning, match=r"4 experts of 4 parameters see no token .* left untrained"):
        guard = Guard(model, calibration, budget=1e-2)
    before = {layer.name: layer.curlora_U["default"].weight.detach().clone() for layer in wrappers(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    guard.attach(optimizer)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for layer in wrappers(model):
        U = layer.curlora_U["default"].weight
        mask = unused[layer.name]
        assert torch.equal(U[mask], before[layer.name][mask])
        assert not torch.equal(U[~mask], before[layer.name][~mask])


def test_what_experts_cannot_have_is_refused():
    model = get_peft_model(qwen3(), CurloraConfig(r=3, **NAMED["qwen3"][1]))
    with pytest.raises(GuardError, match="calibrate with gradients"):
        calibrate(model, rows(), gradients=False, progress=False)
    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.raises(GuardError, match="columns and rows cannot be chosen for a task there"):
        redraw(model, [batch], rows(), progress=False)
    assert math.isfinite(float(model(**batch).loss))


def test_a_ledger_of_experts_belongs_to_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CURLORA_CACHE_DIR", str(tmp_path / "cache"))
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(mixtral(), CurloraConfig(r=3, **targets))
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    budget = ForgettingBudget(0.1, texts={"words": list(tokens(seed=5, batch=16))})
    Trainer(model, arguments, train_dataset=rows, callbacks=[budget]).train()
    model.save_pretrained(tmp_path / "saved")
    assert inspect_adapter(tmp_path / "saved").ledger_fits


def test_a_rank_that_is_too_high_in_a_later_layer_is_named():
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = CurloraConfig(r=3, rank_pattern={"layers.1.mlp.experts.down_proj": 40}, **targets)
    with pytest.raises(ValueError, match="40"):
        get_peft_model(mixtral(), config)
