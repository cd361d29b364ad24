"""Which layers are adapted, compared with PEFT's LoRA with the same options."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from curlora import CurloraConfig
from tests.models import BASES, layers

OPTIONS = {
    "names": dict(target_modules=["q_proj", "c_attn", "down_proj"]),
    "regular expression": dict(target_modules=r".*\.[01]\..*(v_proj|c_fc)"),
    "all-linear": dict(target_modules="all-linear"),
    "exclude names": dict(target_modules="all-linear", exclude_modules=["k_proj", "c_proj"]),
    "exclude by regular expression": dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "one layer": dict(target_modules=["q_proj", "c_attn"], layers_to_transform=1),
    "the first layer": dict(target_modules=["q_proj", "c_attn"], layers_to_transform=0),
    "tuples": dict(
        target_modules=("q_proj", "v_proj", "c_attn"), exclude_modules=("v_proj",), layers_to_transform=(1, 0)
    ),
    "layers of a list": dict(
        target_modules=["o_proj", "c_fc"], layers_to_transform=[0], layers_pattern=["layers", "h"]
    ),
    "bias": dict(target_modules=["q_proj", "c_attn"], bias="all"),
    "saved whole": dict(target_modules="all-linear", modules_to_save=["lm_head"]),
    "ranks": dict(
        target_modules="all-linear", rank_pattern={"layers.1.*.q_proj": 3, "h.0.*c_attn": 2, "^.*up_proj": 5}
    ),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys", "ignore:fan_in_fan_out")
def test_the_layers_are_those_that_lora_adapts(base, options):
    model = get_peft_model(BASES[base](), CurloraConfig(r=4, **options))
    lora = get_peft_model(BASES[base](), LoraConfig(r=4, **options))
    expected = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in lora.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {layer.name: layer.r["default"] for layer in layers(model)} == expected
    assert "lm_head" not in expected

    def trained(model, prefix):
        return {name for name, p in model.named_parameters() if p.requires_grad and prefix not in name}

    assert trained(model, "curlora_") == trained(lora, "lora_")


@pytest.mark.parametrize("base", BASES)
def test_all_linear_means_the_same_layers_for_a_second_adapter(base):
    model = get_peft_model(BASES[base](), CurloraConfig(r=4))
    model.add_adapter("second", CurloraConfig(r=4, target_modules="all-linear"))
    alone = get_peft_model(BASES[base](), CurloraConfig(r=4, target_modules="all-linear"))
    assert {layer.name for layer in layers(model) if "second" in layer.r} == {layer.name for layer in layers(alone)}
