"""Batches with a different adapter for each row, against single rows through each adapter and against PEFT's LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from curlora import CurloraConfig
from curlora.functional import gather_update, gather_update_by_row
from tests.models import BASES, VOCABULARY, classifier, curlora, layers, llama, randomize, tokens

both = pytest.mark.parametrize("base", BASES)
# "default", "second" and "third" have the same draw, "other" has another draw, and "small" has another rank.
ADAPTERS = {
    "second": dict(alpha=0.5),
    "third": dict(),
    "other": dict(seed=1),
    "small": dict(r=3, alpha=2.0),
}


def several(base, **config):
    model = curlora(base, **config)
    for i, (name, options) in enumerate(ADAPTERS.items()):
        model.add_adapter(name, CurloraConfig(**{"r": 4, **config, **options}))
        randomize(model, name, seed=20 + i)
    return model


def lively(base):
    """Return ``base`` in float64 with larger weights, so that the adapters change the next token."""
    for parameter in base.parameters():
        if parameter.ndim == 2:
            parameter.data *= 6
    return base.double()


def one_by_one(model, names, call):
    """Return the outputs for the rows of a mixed batch, each computed alone with its adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(i))
        else:
            model.set_adapter(name)
            rows.append(call(i))
    model.set_adapter("default")
    return torch.cat(rows)


MIXES = {
    "every kind": ["third", "__base__", "small", "default", "other", "second", "default"],
    "alike, all rows": ["second", "default", "third", "default"],
    "one adapter": ["second", "second", "second"],
    "only the base": ["__base__", "__base__"],
}


@both
@pytest.mark.parametrize("names", MIXES.values(), ids=MIXES)
def test_each_row_goes_through_its_adapter(base, names):
    model = several(BASES[base]().double())
    ids = tokens(batch=len(names))
    expected = one_by_one(model, names, lambda i: model(ids[i : i + 1]).logits)
    torch.testing.assert_close(model(ids, adapter_names=names).logits, expected)
    # no hook is left behind
    assert not any(layer._forward_pre_hooks for layer in layers(model))
    torch.testing.assert_close(model(ids).logits, one_by_one(model, ["default"], lambda i: model(ids).logits))


def test_a_row_of_the_base_is_the_base_bit_for_bit():
    ids = tokens(batch=3)
    expected = llama()(ids).logits
    model = several(llama())
    mixed = model(ids, adapter_names=["default", "__base__", "other"]).logits
    assert torch.equal(mixed[1], expected[1])
    assert not torch.allclose(mixed[0], expected[0], atol=1e-4)


def test_an_adapter_on_some_layers_leaves_the_others_alone():
    model = curlora(llama().double(), target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", CurloraConfig(r=4, target_modules=["v_proj", "down_proj"]))
    randomize(model, "second", seed=3)
    ids, names = tokens(batch=3), ["second", "default", "second"]
    expected = one_by_one(model, names, lambda i: model(ids[i : i + 1]).logits)
    torch.testing.assert_close(model(ids, adapter_names=names).logits, expected)


@both
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate(base, num_beams):
    model = several(lively(BASES[base]()))
    names = ["other", "__base__", "second", "small"]
    ids = tokens(batch=4)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=num_beams, pad_token_id=0)

    def generate(ids, **kwargs):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **kwargs)

    expected = one_by_one(model, names, lambda i: generate(ids[i : i + 1]))
    assert torch.equal(generate(ids, adapter_names=names), expected)
    alone = one_by_one(model, ["default"], lambda i: generate(ids))
    assert (alone[:, 7:] != expected[:, 7:]).any(1).all()  # the adapters change the generated tokens


def test_beam_search_repeats_the_names_for_the_decoder_alone():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = several(lively(T5ForConditionalGeneration(config).eval()), task_type=TaskType.SEQ_2_SEQ_LM)
    names, ids = ["second", "__base__", "small"], tokens(batch=3)
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False)
    expected = one_by_one(model, names, lambda i: model.generate(input_ids=ids[i : i + 1], **options))
    assert (model.generate(input_ids=ids, **options) != expected).any(1).all()
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **options), expected)


def test_heads_that_are_saved_whole_are_mixed_too():
    model = several(classifier().double(), task_type=TaskType.SEQ_CLS)
    for i, head in enumerate(model.base_model.model.score.modules_to_save.values()):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(i))
    ids, names = tokens(batch=4) % 99 + 1, ["small", "default", "__base__", "second"]
    expected = one_by_one(model, names, lambda i: model(ids[i : i + 1]).logits)
    torch.testing.assert_close(model(ids, adapter_names=names).logits, expected)


def test_half_precision_and_autocast():
    names, ids = ["second", "default", "other"], tokens(batch=3)
    reference = several(llama())
    expected = reference(ids, adapter_names=names).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reference(ids, adapter_names=names).logits.float()
    assert (got - expected).norm() / expected.norm() < 0.05
    half = several(llama().to(torch.bfloat16))
    expected = one_by_one(half, names, lambda i: half(ids[i : i + 1]).logits)
    got = half(ids, adapter_names=names).logits
    assert got.dtype == torch.bfloat16
    assert (got - expected).float().norm() / expected.float().norm() < 0.02


def refusals(model, ids):
    """Return the errors that a PeftModel raises for each misuse of ``adapter_names``."""
    said = []

    def attempt(**kwargs):
        try:
            model(ids, **kwargs)
        except Exception as error:
            said.append((type(error), str(error)))
        else:
            said.append(None)

    attempt(adapter_names=["default"])
    attempt(adapter_names=["default", "misspelled"])
    model.train()
    attempt(adapter_names=["default", "default"])
    model.eval()
    model.merge_adapter()
    attempt(adapter_names=["default", "__base__"])
    model.unmerge_adapter()
    return said


def test_refused_as_lora_refuses():
    ids = tokens(batch=2)
    lora = refusals(get_peft_model(llama(), LoraConfig(r=4, task_type=TaskType.CAUSAL_LM)).eval(), ids)
    assert all(lora)
    model = curlora(llama(), task_type=TaskType.CAUSAL_LM)
    before = model(ids).logits
    assert refusals(model, ids) == lora
    torch.testing.assert_close(model(ids).logits, before)  # no hook is left after a refusal
    with pytest.raises(TypeError, match="expected a list of str"):
        model(ids, adapter_names="default")


def test_disabled_adapters_stay_disabled():
    ids = tokens()
    expected = llama()(ids).logits
    model = several(llama())
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=["second", "other"]).logits, expected)


def test_adapters_drawn_alike_hold_one_factor_whatever_happens_to_the_model():
    def pointers(model, *names):
        return [{layer.basis(name).factor.data_ptr() for name in names} for layer in layers(model)]

    model = several(llama())
    alike, all_of_them = ("default", "second", "third"), ("default", "second", "third", "other", "small")
    for changed in (model, copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()):
        assert all(len(found) == 1 for found in pointers(changed, *alike))
        assert all(len(found) == 3 for found in pointers(changed, *all_of_them))
    before = model(tokens()).logits
    model.delete_adapter("second")
    assert torch.equal(model(tokens()).logits, before)


def test_one_group_however_many_adapters_are_drawn_alike(monkeypatch):
    from curlora.tuner import mixed_batch

    calls = []

    def counted(*args):
        calls.append(1)
        return gather_update_by_row(*args)

    monkeypatch.setattr(mixed_batch, "gather_update_by_row", counted)
    model = curlora(llama().double())
    names = ["default", *(f"a{i}" for i in range(30))]
    for i, name in enumerate(names[1:]):
        model.add_adapter(name, CurloraConfig(r=4))
        randomize(model, name, seed=i)
    ids = tokens(batch=len(names))
    mixed = model(ids, adapter_names=names).logits
    assert len(calls) == len(layers(model))
    torch.testing.assert_close(mixed, one_by_one(model, names, lambda i: model(ids[i : i + 1]).logits))


@pytest.mark.parametrize("lead", [(5,), (5, 3), (5, 2, 3), (5, 0)])
def test_by_row_is_row_by_row(lead):
    rng = torch.Generator().manual_seed(0)
    output = torch.randn(*lead, 9, generator=rng, dtype=torch.float64)
    scaled_U, factor = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((5, 4, 4), (9, 4)))
    index, offset = torch.tensor([3, 0, 3, 8]), torch.randn(4, generator=rng, dtype=torch.float64)
    got = gather_update_by_row(output, scaled_U, factor, index, offset)
    expected = torch.stack([gather_update(output[i], scaled_U[i], factor, index, offset) for i in range(5)])
    torch.testing.assert_close(got, expected)
