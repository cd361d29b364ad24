"""Weighted sums of adapters, against the sum of their dense updates, and in another process."""

import subprocess
import sys

import pytest
import torch
from peft import TaskType

from curlora import CurloraConfig
from tests.models import BASES, classifier, curlora, layers, llama, randomize, tokens

both = pytest.mark.parametrize("base", BASES)


def several(base, **options):
    """Return ``base`` with three adapters of different alphas. ``options`` are those of the second and the third."""
    model = curlora(base, alpha=0.5)
    for i, name in enumerate(("second", "third")):
        model.add_adapter(name, CurloraConfig(**{"r": 4, "alpha": 2.0 - i, **options}))
        randomize(model, name, seed=20 + i)
    return model


def updates(model, name):
    return {layer.name: layer.get_delta_weight(name) for layer in layers(model) if name in layer.r}


def weighted(model, names, weights):
    total = {}
    for name, weight in zip(names, weights, strict=True):
        for layer, update in updates(model, name).items():
            total[layer] = total.get(layer, 0) + weight * update
    return total


NAMES, WEIGHTS = ["default", "second", "third"], [0.7, -1.3, 2.0]
WAYS = {
    "linear": ("linear", {}),
    "cat, one draw": ("cat", {}),
    "cat, other draws": ("cat", dict(seed=5)),
    "cat, other ranks": ("cat", dict(r=3, rank_pattern={"layers.1.self_attn.q_proj": 2, "h.1.attn.c_attn": 5})),
}


@both
@pytest.mark.parametrize(("kind", "options"), WAYS.values(), ids=WAYS)
def test_it_is_the_weighted_sum(base, kind, options):
    model = several(BASES[base]().double(), **options)
    before = model(tokens()).logits
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type=kind)
    assert torch.equal(model(tokens()).logits, before)  # the new adapter is not active
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)

    expected, got = weighted(model, NAMES, WEIGHTS), updates(model, "sum")
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    if kind == "linear":
        assert {layer.r["sum"] for layer in layers(model)} == {4}
    else:
        assert all(layer.r["sum"] == sum(layer.r[name] for name in NAMES) for layer in layers(model))

    model.set_adapter("sum")
    plain = BASES[base]().double()
    for name, update in expected.items():
        plain.get_submodule(name).weight.data += update
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


OVERLAPPING = {"target_modules": r".*layers\.\d+\.(self_attn\.v_proj|mlp\.up_proj)"}


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_adapters_on_other_layers_and_saved_for_another_process(kind, tmp_path):
    model = several(llama(), **OVERLAPPING)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", kind)
    for name, expected in weighted(model, NAMES, WEIGHTS).items():
        torch.testing.assert_close(updates(model, "sum")[name], expected)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.save(model(tokens()).logits, tmp_path / "logits.pt")
    code = f"""
import torch, curlora
from peft import PeftModel
from tests.models import llama, layers, tokens
model = PeftModel.from_pretrained(llama(), r"{tmp_path / "sum"}").eval()
assert len(layers(model)) == 8
assert torch.equal(model(tokens()).logits, torch.load(r"{tmp_path}/logits.pt"))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_sum_can_be_trained_merged_and_summed_again():
    model = several(llama())
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    model.add_weighted_adapter(["sum", "default"], [2.0, 1.0], "again")
    for name, expected in weighted(model, NAMES, [2.4, -2.6, 4.0]).items():
        torch.testing.assert_close(updates(model, "again")[name], expected)
    model.set_adapter("sum")
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert all(layer.curlora_U["sum"].weight.grad.abs().sum() > 0 for layer in layers(model))
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_present_scaling_counts():
    model = several(llama())
    for layer in layers(model):
        layer.set_scale("second", 0.5)
    expected = weighted(model, NAMES, WEIGHTS)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", "linear")
    for layer, update in updates(model, "sum").items():
        torch.testing.assert_close(update, expected[layer], rtol=1e-4, atol=1e-6)


def test_one_adapter_is_scaled():
    model = several(llama().double())
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["second"], [-0.25], kind, combination_type=kind)
        for name, expected in weighted(model, ["second"], [-0.25]).items():
            torch.testing.assert_close(updates(model, kind)[name], expected)
        assert {layer.r[kind] for layer in layers(model)} == {4}


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_what_prunes_is_linear_where_nothing_is_pruned_and_nothing_disagrees(kind):
    model = several(llama().double())
    for layer in layers(model):  # all entries have the same sign, so that ties has no sign to elect
        for U in layer.curlora_U.values():
            U.weight.data.abs_()
    weights = [1.0, 1.0, 1.0]
    model.add_weighted_adapter(NAMES, weights, "all", kind, density=1.0)
    expected = weighted(model, NAMES, weights)
    if kind in ("ties", "dare_ties"):  # these divide by the number of adapters that agree
        expected = {name: update / 3 for name, update in expected.items()}
    for name, update in updates(model, "all").items():
        torch.testing.assert_close(update, expected[name])
    model.add_weighted_adapter(NAMES, weights, "pruned", kind, density=0.5)
    kept = sum(int((layer.curlora_U["pruned"].weight != 0).sum()) for layer in layers(model))
    assert 0 < kept < 16 * len(layers(model))


def test_half_precision_keeps_the_dtype_of_U():
    model = several(llama().to(torch.bfloat16))
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    assert {layer.curlora_U["sum"].weight.dtype for layer in layers(model)} == {torch.float32}


def test_the_one_head_that_was_trained_comes_along():
    model = curlora(classifier(), task_type=TaskType.SEQ_CLS)
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.base_model.peft_config["headless"] = CurloraConfig(r=4)
    model.base_model.inject_adapter(model.base_model.model, "headless")
    model.add_weighted_adapter(["headless", "default"], [0.0, 1.0], "sum")
    ids = tokens() % 99 + 1
    expected = model(ids).logits
    model.set_adapter("sum")
    torch.testing.assert_close(model(ids).logits, expected)


REFUSED = {
    "unknown": ((["default", "lost"], [1, 1], "sum"), "Adapter lost does not exist"),
    "none": (([], [], "sum"), r"Found no adapter matching the names in \[\]"),
    "twice": ((["default", "default"], [1, 1], "sum"), "more than once"),
    "weights": ((["default", "second"], [1], "sum"), "one weight for each adapter, got 1 for 2"),
    "taken": ((["default", "second"], [1, 1], "second"), "Adapter with name 'second' already exists"),
    "svd": ((["default", "second"], [1, 1], "sum", "svd"), "Invalid combination_type: svd.*'cat', always exact"),
    "density": ((["default", "second"], [1, 1], "sum", "ties"), "needs density"),
    "other draw": ((["default", "other"], [1, 1], "sum"), "q_proj'. Use combination_type='cat'"),
    "rank": ((["default", "second", "other", "wide"], [1] * 4, "sum", "cat"), r"k_proj' rank 20.*above the 16"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_sentence_and_the_model_left_alone(arguments, message):
    model = several(llama())
    model.add_adapter("other", CurloraConfig(r=4, seed=9))
    model.add_adapter("wide", CurloraConfig(r=8))
    ids = tokens()
    before, names = model(ids).logits, set(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == names
    assert all(set(layer.r) == names for layer in layers(model))
    assert torch.equal(model(ids).logits, before)


def test_refused_where_something_is_not_in_U_alone():
    model = several(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot add a weighted adapter while adapters are merged"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    biased = curlora(llama(), bias="all")
    with pytest.raises(ValueError, match=r"'default' trained biases.*\(bias='all'\)"):
        biased.add_weighted_adapter(["default"], [1.0], "sum")
    known = curlora(llama(), trainable_token_indices=[3])
    with pytest.raises(ValueError, match="'default' trained the embeddings of tokens"):
        known.add_weighted_adapter(["default"], [1.0], "sum")
    heads = curlora(classifier(), task_type=TaskType.SEQ_CLS)
    heads.add_adapter("second", CurloraConfig(r=4, task_type=TaskType.SEQ_CLS))
    with pytest.raises(ValueError, match="same module with modules_to_save, but found 1"):
        heads.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
