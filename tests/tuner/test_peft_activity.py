"""Which adapters are active, trained, merged or deleted after each step, compared with PEFT's LoRA."""

import copy
import dataclasses
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict

from curlora import CurloraConfig
from tests.models import curlora, layers, llama, tokens

TARGETS = ["q_proj", "k_proj", "v_proj"]
CONFIGS = {"curlora": CurloraConfig(r=4, target_modules=TARGETS), "lora": LoraConfig(r=4, target_modules=TARGETS)}
# Entries that name the method, or count its parameters.
OWN = {"adapter_model_type", "peft_types", "trainable_params", "total_params", "module_type"}


def with_two(kind):
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS[kind]))
    model.add_adapter("other", copy.deepcopy(CONFIGS[kind]))
    return model


def status(model):
    """Return everything that PEFT reports about a model and its layers, without entries that differ by method."""
    reports = [model.get_model_status(), *model.get_layer_status()]
    return [{k: v for k, v in dataclasses.asdict(report).items() if k not in OWN} for report in reports]


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, model.base_model.tuner_layer_cls)]


def leave_inner_of_two_contexts(model):
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        return status(model)


def disabled_while_merged(model):
    model.merge_adapter()
    with model.disable_adapter():
        model(tokens())
        return status(model)


STEPS = {
    "nothing": lambda model: None,
    "the other": lambda model: model.set_adapter("other"),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "for inference": lambda model: model.set_adapter("other", inference_mode=True),
    "both for inference": lambda model: model.base_model.set_adapter(["default", "other"], inference_mode=True),
    "for inference, then to train": lambda model: (
        model.set_adapter("other", inference_mode=True),
        model.set_adapter("other"),
    ),
    "an unknown adapter": lambda model: model.set_adapter("unknown"),
    "frozen": lambda model: model.set_requires_grad("default", requires_grad=False),
    "both trained": lambda model: model.set_requires_grad(["default", "other"]),
    "merged": lambda model: model.merge_adapter(),
    "the other merged": lambda model: model.merge_adapter(["other"]),
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "inner of two contexts left": leave_inner_of_two_contexts,
    "disabled while merged": disabled_while_merged,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "one layer disabled": lambda model: tuner_layers(model)[0].enable_adapters(False),
    "one layer with another": lambda model: tuner_layers(model)[0].set_adapter("other"),
    "deleted": lambda model: model.delete_adapter("default"),
    "the other deleted": lambda model: model.delete_adapter("other"),
    "an unknown one deleted": lambda model: model.delete_adapter("unknown"),
    "deleted while merged": lambda model: (model.merge_adapter(), model.delete_adapter("default")),
    "one of two active deleted": lambda model: (
        model.base_model.set_adapter(["default", "other"]),
        model.delete_adapter("default"),
    ),
}

INSIDE = {"inner of two contexts left", "disabled while merged"}  # steps that report from inside a context


@pytest.mark.parametrize("step", STEPS)
def test_status_warnings_and_errors_are_as_with_lora(step):
    def after(kind):
        model, error = with_two(kind), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                inside = STEPS[step](model)
            except (KeyError, ValueError) as raised:
                inside, error = None, raised
        trained = {name.partition(".base_layer")[0] for name, p in model.named_parameters() if p.requires_grad}
        modules = {name.partition("_proj")[0] for name in trained}
        adapters = {part for name in trained for part in name.split(".") if part in ("default", "other")}
        return {
            "status": status(model),
            "inside": inside if step in INSIDE else None,
            "configurations": list(model.peft_config),
            "active": model.active_adapters,
            "trained": (modules, adapters),
            "warnings": [str(warning.message) for warning in caught if warning.category is not FutureWarning],
            "error": (type(error), str(error)),
        }

    found, expected = after("curlora"), after("lora")
    for what, value in expected.items():
        assert found[what] == value, what


def test_without_its_only_adapter_it_is_the_base_and_can_be_given_another():
    model = curlora(llama())
    frozen, ids = llama()(tokens()).logits, tokens()
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert not model.peft_config
    assert torch.equal(model.base_model.model(ids).logits, frozen)
    assert not [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("new", CurloraConfig(r=3, target_modules=TARGETS))
    model.set_adapter("new")
    assert torch.equal(model(ids).logits, frozen)
    model(ids, labels=ids).loss.backward()
    assert all(layer.curlora_U["new"].weight.grad.abs().sum() > 0 for layer in layers(model))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_state_dict_of_another_base_is_refused_where_it_was_injected(low_memory):
    other = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(curlora(llama(seed=3))).items()
    }
    model = inject_adapter_in_model(CONFIGS["curlora"], llama(), low_cpu_mem_usage=low_memory).eval()
    with pytest.raises(ValueError, match="made on another base model"):
        set_peft_model_state_dict(model, other, low_cpu_mem_usage=low_memory)
    # An adapter without values is removed again.
    assert len(layers(model)) == (0 if low_memory else 6)
    assert torch.equal(model(tokens()).logits, llama()(tokens()).logits)
