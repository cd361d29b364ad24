"""PEFT's features for LoRA adapters, with CURLoRA adapters, each compared with LoRA."""

import copy
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

import curlora as package
from curlora import CurloraConfig
from curlora.tuner.config import LEDGER_NAME
from tests.models import classifier, curlora, layers, llama, randomize, tokens

HEADS = {"SEQ_CLS": LlamaForSequenceClassification, "TOKEN_CLS": LlamaForTokenClassification}


@pytest.mark.parametrize("task", HEADS)
def test_a_fresh_head_is_trained_saved_and_loaded(task, tmp_path):
    model = get_peft_model(classifier(HEADS[task]), CurloraConfig(r=4, task_type=task))
    randomize(model)
    lora = get_peft_model(classifier(HEADS[task]), LoraConfig(task_type=task, target_modules=["q_proj"]))
    assert model.peft_config["default"].modules_to_save == lora.peft_config["default"].modules_to_save
    head = model.base_model.model.score.modules_to_save["default"].weight
    fresh = head.detach().clone()
    labels = torch.tensor([0, 2]) if task == "SEQ_CLS" else tokens() % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(tokens(), labels=labels).loss
    before.backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(head, fresh)
    assert model(tokens(), labels=labels).loss < before
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(HEADS[task]), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(loaded(tokens()).logits, classifier(HEADS[task])(tokens()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_few_tokens_are_trained_saved_and_merged(tied, tmp_path):
    def base():
        return llama(tie_word_embeddings=tied)

    ids = tokens(batch=8, length=12)
    few = ids.unique()[[1, 9, 20]].tolist()
    model = get_peft_model(base(), CurloraConfig(r=4, trainable_token_indices=few)).eval()
    assert torch.equal(model(tokens()).logits, base()(tokens()).logits)
    count = sum(layer.curlora_U["default"].weight.numel() for layer in layers(model))
    assert model.get_nb_trainable_parameters()[0] == count + len(few) * 32
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    # A second adapter on the same model trains other tokens.
    loaded.add_adapter("second", CurloraConfig(r=4, trainable_token_indices=[5]))
    mixed = loaded(ids, adapter_names=["default", "second"] * 4).logits
    torch.testing.assert_close(mixed[::2], expected[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1::2], base()(ids).logits[1::2], rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    before, after = base().get_input_embeddings().weight, merged.get_input_embeddings().weight
    assert (before != after).any(1).nonzero()[:, 0].tolist() == few


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype(autocast, dtype, tmp_path):
    model = get_peft_model(llama().bfloat16(), CurloraConfig(r=4), autocast_adapter_dtype=autocast)
    lora = get_peft_model(llama().bfloat16(), LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=autocast)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {dtype}
    assert {layer.curlora_U["default"].weight.dtype for layer in layers(model)} == {dtype}
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast, is_trainable=True
    ).eval()
    assert {layer.curlora_U["default"].weight.dtype for layer in layers(loaded)} == {dtype}
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    loaded(tokens(), labels=tokens()).loss.backward()
    assert {layer.curlora_U["default"].weight.grad.dtype for layer in layers(loaded)} == {dtype}


def test_disabling_in_disabling_and_while_merged():
    base, model = llama(), curlora(llama())
    frozen, adapted = base(tokens()).logits, model(tokens()).logits
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(tokens()).logits, frozen)
    assert torch.equal(model(tokens()).logits, adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, frozen)
    assert torch.equal(model(tokens()).logits, adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_it_is_the_base_that_adapters_were_made_on(dtype, tmp_path):
    other = curlora(llama().to(dtype), seed=9)
    other.save_pretrained(tmp_path / "other")
    model = curlora(llama().to(dtype))
    before = model(tokens()).logits
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(tokens()).logits, before)
    model.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*precision")
        model.load_adapter(tmp_path / "other", "other")
    model.set_adapter("other")
    assert torch.equal(model.eval()(tokens()).logits, other(tokens()).logits)


def test_deleting_the_active_adapter_is_as_with_lora():
    def after(config):
        model = get_peft_model(llama(), config)
        model.add_adapter("other", copy.deepcopy(config))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.delete_adapter("default")
        return model, list(model.peft_config), model.active_adapters, [str(w.message) for w in caught]

    ours, *found = after(CurloraConfig(r=4))
    _, *expected = after(LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert found == expected
    assert all(set(layer.r) == {"other"} for layer in layers(ours))


def test_status_and_requires_grad_are_as_with_lora():
    ours, lora = curlora(llama()), get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    for model in (ours, lora):
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.set_requires_grad("default", requires_grad=False)
    found, expected = ours.get_model_status(), lora.get_model_status()
    for field in ("num_adapter_layers", "enabled", "active_adapters", "merged_adapters", "requires_grad"):
        assert getattr(found, field) == getattr(expected, field), field
    assert found.trainable_params == 0 == expected.trainable_params
    for one, two in zip(ours.get_layer_status(), lora.get_layer_status(), strict=True):
        assert (one.name, one.active_adapters, one.requires_grad) == (two.name, two.active_adapters, two.requires_grad)


@pytest.mark.parametrize("low_memory", [False, True])
def test_injected_into_a_model_and_its_state_dict_given_back(low_memory):
    source = curlora(llama())
    state = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(CurloraConfig(r=4), llama(), low_cpu_mem_usage=low_memory).eval()
    result = set_peft_model_state_dict(
        model,
        {key.removeprefix("base_model.model."): value for key, value in state.items()},
        low_cpu_mem_usage=low_memory,
    )
    assert not result.unexpected_keys
    assert torch.equal(model(tokens()).logits, source(tokens()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_new_words_go_along_as_with_lora(tied, tmp_path):
    """PEFT sees from the base model's configuration that the embeddings were resized, and saves them too."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def resized(seed):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(110)
        return base.eval()

    lora = get_peft_model(resized(0), LoraConfig(target_modules=["q_proj"]))
    model = curlora(resized(0))
    for kind, saved in (("lora", lora), ("curlora", model)):
        with pytest.warns(UserWarning, match="embedding layer has been resized"):
            saved.save_pretrained(tmp_path / kind)
    found, expected = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("curlora", "lora"))
    embeddings = {key for key in expected if "lora_" not in key}
    assert {key for key in found if "curlora_" not in key} == embeddings
    assert all(torch.equal(found[key], expected[key]) for key in embeddings)
    new_words = tokens() % 10 + 100
    fresh = resized(1)
    assert not torch.equal(fresh(new_words).logits, resized(0)(new_words).logits)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "curlora").eval()
    assert torch.equal(loaded(new_words).logits, model(new_words).logits)


def test_a_tied_head_is_as_with_lora_until_it_is_merged(tmp_path):
    tied = lambda: llama(tie_word_embeddings=True)  # noqa: E731

    def caught(make):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            made = make()
        return made, [str(warning.message) for warning in found if "tie" in str(warning.message)]

    model, ours = caught(lambda: curlora(tied(), target_modules=["lm_head"]))
    _, theirs = caught(lambda: get_peft_model(tied(), LoraConfig(target_modules=["lm_head"])))
    # PEFT's warning has another ending for methods that can also tie their adapters.
    assert len(ours) == len(theirs) > 0
    assert all("a tied layer is part of the adapter" in text for text in ours)
    package.save_as_lora(tmp_path, model)
    lora = PeftModel.from_pretrained(tied(), tmp_path).eval()
    torch.testing.assert_close(model(tokens()).logits, lora(tokens()).logits)
    # LoRA's merge would also change the embeddings, which share the weight. CURLoRA unties them first.
    expected = model(tokens()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, tied().get_input_embeddings().weight)


def test_the_model_card_and_a_subfolder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = curlora(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "repository" / "inside")
    card = ModelCard.load(tmp_path / "repository" / "inside" / "README.md").data
    assert card.library_name == "peft"
    assert card.base_model == str(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    lora = ModelCard.load(tmp_path / "lora" / "README.md").data.to_dict()
    assert card.to_dict() == {**lora, "tags": [tag for tag in lora["tags"] if tag != "lora"]}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "repository", subfolder="inside").eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_an_adapter_is_swapped_for_another(tmp_path):
    other = curlora(llama(), seed=9, alpha=0.5)
    other.save_pretrained(tmp_path / "other")
    curlora(llama(seed=1)).save_pretrained(tmp_path / "foreign")
    model = curlora(llama())
    hotswap_adapter(model, tmp_path / "other", adapter_name="default", torch_device="cpu")
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert torch.equal(again(tokens()).logits, other(tokens()).logits)
    with pytest.raises(ValueError, match=r"made on another base model.*Adapter 'default' is as it was\."):
        hotswap_adapter(model, tmp_path / "foreign", adapter_name="default", torch_device="cpu")
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_a_swapped_adapter_takes_its_ledger_and_its_draw_along(tmp_path):
    other = curlora(llama(), seed=9)
    other.peft_config["default"].beside[LEDGER_NAME] = b"the other's"
    other.save_pretrained(tmp_path / "other")
    model = curlora(llama())
    model.peft_config["default"].beside[LEDGER_NAME] = b"its own"
    hotswap_adapter(model, tmp_path / "other", adapter_name="default", torch_device="cpu")
    assert model.peft_config["default"].beside == {LEDGER_NAME: b"the other's"}
    drawn_first = curlora(llama())
    model.add_adapter("drawn as the first", CurloraConfig(r=4))
    for one, two in zip(layers(model), layers(drawn_first), strict=True):
        assert torch.equal(one.basis("drawn as the first").indices, two.basis("default").indices)


def test_what_knows_lora_alone_says_so_and_changes_nothing():
    model = curlora(llama())
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
    assert torch.equal(model(tokens()).logits, before)


def test_rows_with_adapters_of_their_own_compile():
    model = curlora(llama())
    model.add_adapter("other", CurloraConfig(r=3, seed=5))
    randomize(model, "other", seed=8)
    names = ["other", "default"]
    expected = model(tokens(), adapter_names=names).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(), adapter_names=names).logits, expected)
