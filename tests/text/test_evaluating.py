"""A model with disabled adapters is its base model, and is restored afterwards."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, inject_adapter_in_model

from curlora import CurloraConfig
from curlora.text.evaluating import without_adapters
from tests.models import curlora, llama, randomize, tokens

LORA = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)


def with_saved_modules():
    model = get_peft_model(llama(), CurloraConfig(r=4, modules_to_save=["lm_head"]))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    return model


ADAPTED = {
    "curlora": lambda: curlora(llama()),
    "lora": lambda: get_peft_model(llama(), LORA),
    "injected": lambda: inject_adapter_in_model(LORA, llama()),
    "a module beside it": with_saved_modules,
    "prefix": lambda: get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("kind", ADAPTED)
def test_it_is_the_base_while_it_lasts(kind):
    model = ADAPTED[kind]()
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # frozen by the user
    before, trained = logits(model), [p.requires_grad for p in model.parameters()]
    with without_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, logits(llama()))
    assert [p.requires_grad for p in model.parameters()] == trained
