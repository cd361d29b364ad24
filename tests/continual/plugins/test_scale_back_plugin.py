"""Any method scaled back to a limit: the baseline of a guard."""

import math

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curlora.continual import load_recipe, run_recipe
from curlora.continual.errors import RecipeError, RecipeWarning
from curlora.continual.heldout import measure
from curlora.continual.launch import build
from curlora.continual.plugins import make_plugin
from curlora.guard import measured_limit, scale_to_limit
from tests.continual.streams import figures

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has", "ignore:The text")

METHODS = {
    "lora": {"method": "lora", "learning_rate": 0.05, "options": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "full": {"method": "full", "learning_rate": 1e-3},
}


def scaled(path, kind, **limit):
    content = yaml.safe_load(path.read_text())
    plain = {"name": "plain", **METHODS[kind]}
    content["methods"] = [plain, {**plain, "name": "scaled", "plugins": [{"name": "scale_back", **limit}]}]
    path.write_text(yaml.safe_dump(content))
    return load_recipe(path)


def adapted(recipe, directory, kind):
    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(directory / "model")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.model.name), directory / "adapter")


@pytest.mark.parametrize("kind", list(METHODS))
def test_the_limit_is_kept_by_what_is_saved(kind, guarded_path, tmp_path):
    recipe = scaled(guarded_path, kind, max_perplexity_increase=0.002)
    results = run_recipe(recipe, tmp_path / "run")
    text = build(recipe).guard_text
    before = measure(AutoModelForCausalLM.from_pretrained(recipe.model.name), text).perplexity
    rises = {
        name: measure(adapted(recipe, tmp_path / "run" / name / "seed-0", kind), text).perplexity / before - 1
        for name in ("plain", "scaled")
    }
    assert rises["plain"] > 0.01  # else there is nothing to scale back
    assert rises["scaled"] <= 0.002
    kept = results.methods[-1].seeds[0].guarded
    assert [record.limit for record in kept] == [0.001, 0.002]
    assert all(0 <= record.scale < 1 and record.predicted is None and record.kl is None for record in kept)
    assert kept[-1].perplexity_rise == pytest.approx(rises["scaled"], abs=1e-5)
    assert results.methods[-1].plugins == [{"name": "scale_back", "max_perplexity_increase": 0.002, "spread": True}]


@pytest.mark.parametrize("name", ["scale_back", "guard"])
def test_the_divergence_may_be_limited(name, guarded_path, tmp_path):
    content = yaml.safe_load(guarded_path.read_text())
    method = content["methods"][0]
    content["methods"] = [{**method, "plugins": [{"name": name, "max_kl": 0.001, "spread": False}]}]
    guarded_path.write_text(yaml.safe_dump(content))
    results = run_recipe(load_recipe(guarded_path), tmp_path / "run")
    seed = results.methods[-1].seeds[0]
    followed = seed.heldout["more words"]
    for record, score in zip(seed.guarded, followed[1:], strict=True):
        assert 0 < record.kl <= record.limit == 0.001
        assert record.kl == pytest.approx(score.drift, rel=1e-3)
        assert record.perplexity_rise == pytest.approx(score.perplexity / followed[0].perplexity - 1, abs=1e-5)
    assert results.shown == ["more words"]


def test_the_heads_are_left_alone(guarded_path, tmp_path):
    recipe = scaled(guarded_path, "lora", max_perplexity_increase=1e-9)
    run_recipe(recipe, tmp_path / "run")
    plain, kept = (load_file(tmp_path / "run" / name / "seed-0" / "heads.safetensors") for name in ("plain", "scaled"))
    assert torch.equal(plain["0.weight"], kept["0.weight"])


@pytest.mark.parametrize("name", ["scale_back", "guard"])
def test_a_change_that_is_taken_back_as_a_whole_is_warned_of(name, guarded_path, tmp_path, monkeypatch):
    content = yaml.safe_load(guarded_path.read_text())
    content["methods"] = [{**content["methods"][0], "name": "cur", "plugins": [{"name": name, "max_kl": 0.001}]}]
    guarded_path.write_text(yaml.safe_dump(content))
    unreachable = lambda limit, *rest: scale_to_limit(-1.0, *rest)  # noqa: E731
    monkeypatch.setattr(measured_limit, "scale_to_limit", unreachable)
    with pytest.warns(RecipeWarning, match="cur, seed 0: no part of the change by 'first', 'second' keeps the limit"):
        results = run_recipe(load_recipe(guarded_path), tmp_path / "run")
    assert [record.scale for record in results.methods[-1].seeds[0].guarded] == [0, 0]


def test_gone_on_with_it_is_as_if_uninterrupted(guarded_path, tmp_path):
    recipe = scaled(guarded_path, "lora", max_perplexity_increase=0.002)
    whole = run_recipe(recipe, tmp_path / "whole")
    from tests.continual.streams import Cut

    class Stop:
        def stage(self, text):
            if text.startswith("scaled: scoring after first"):
                raise Cut

        def advance(self, units): ...

    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "cut", lambda total: Stop())
    assert figures(run_recipe(recipe, tmp_path / "cut")) == figures(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one limit: max_perplexity_increase or max_kl"),
        ({"max_perplexity_increase": 0.1, "max_kl": 0.1}, "give one limit"),
        ({"max_kl": 0}, "max_kl must be a positive number of nats per token, got 0"),
        ({"max_perplexity_increase": math.inf}, "must be a positive share"),
        ({"max_kl": 0.1, "spread": 2}, "spread must be true or false, got 2"),
    ],
)
@pytest.mark.parametrize("name", ["scale_back", "guard"])
def test_what_is_no_limit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plugin(name, options)


def test_a_recipe_without_a_general_text_is_refused(recipe_path):
    plugin = "methods.1.plugins=[{name: scale_back, max_kl: 0.1}]"
    with pytest.raises(RecipeError, match="method 'lora': plug-in 'scale_back' needs a general text"):
        load_recipe(recipe_path, [plugin])
    with pytest.raises(RecipeError, match="method 'lora' needs a general text"):
        load_recipe(recipe_path, ["methods.1.options={init_lora_weights: corda, target_modules: [q_proj]}"])


def test_corda_begins_as_the_base_model_and_is_measured_from_it(guarded_path, tmp_path):
    content = yaml.safe_load(guarded_path.read_text())
    options = {"r": 2, "lora_alpha": 2, "init_lora_weights": "corda", "target_modules": ["q_proj"]}
    content["methods"] = [
        {"name": "corda", "method": "lora", "learning_rate": 1e-12, "options": options},
        {"name": "trained", "method": "lora", "learning_rate": 0.01, "options": options},
    ]
    content["heldout"] = {**content["heldout"], "tokens": 40}
    guarded_path.write_text(yaml.safe_dump(content))
    results = run_recipe(load_recipe(guarded_path), tmp_path / "run")
    untrained, trained = (method.seeds[0] for method in results.methods[1:])
    assert untrained.lost("more words") == pytest.approx(0, abs=1e-5)
    # CorDA trains the part of the weights that the text uses least, so the text is hardly affected.
    assert trained.lost("more words") < 1e-4
    saved = [
        load_file(tmp_path / "run" / name / "seed-0/adapter/adapter_model.safetensors") for name in ("corda", "trained")
    ]
    assert all(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
