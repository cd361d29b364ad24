"""The guard over a stream on a small model."""

import json
import math

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curlora.callbacks.ewc import Consolidated
from curlora.continual import load_recipe, run_recipe
from curlora.continual.answers import Answers
from curlora.continual.errors import RecipeError, RunError
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.launch import build
from curlora.continual.method_run import MethodRun
from curlora.continual.plugins import GuardPlugin, KLToBasePlugin, TaskContext
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from tests.continual.streams import Cut, figures
from tests.models import curlora, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")


def guard_text(recipe):
    return build(recipe).guard_text


def test_the_budget_holds_on_the_guard_text_after_every_task(guarded_path, tmp_path):
    recipe = load_recipe(guarded_path)
    results = run_recipe(recipe, tmp_path / "run")
    text = guard_text(recipe)
    assert len(text.tokens) == 256
    rises = {}
    for method in ("cur", "guarded"):
        base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
        before = measure(base, text).perplexity
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / method / "seed-0" / "adapter")
        rises[method] = measure(adapted, text).perplexity / before - 1
    assert rises["cur"] > 0.004  # else there is nothing to guard
    assert rises["guarded"] <= 0.002
    frozen, plain, guarded = (method.seeds[0] for method in results.methods)
    assert [outcome.limit for outcome in guarded.guarded] == [0.001, 0.002]  # in equal steps
    assert all(outcome.perplexity_rise <= outcome.limit and 0 <= outcome.scale <= 1 for outcome in guarded.guarded)
    assert guarded.guarded[-1].perplexity_rise == pytest.approx(rises["guarded"], abs=1e-5)
    assert [step for step, _ in guarded.drifts] == [step for step, _ in guarded.losses]
    assert max(drift for _, drift in guarded.drifts) <= 0.002 * (1 + 1e-3)
    assert not frozen.guarded
    assert not plain.guarded
    assert not plain.drifts


def test_with_slack_the_measurement_decides_in_the_place_of_the_prediction(guarded_path, tmp_path):
    content = yaml.safe_load(guarded_path.read_text())
    content["methods"] = content["methods"][1:]
    content["methods"][0]["plugins"][0]["slack"] = 4.0
    guarded_path.write_text(yaml.safe_dump(content))
    results = run_recipe(load_recipe(guarded_path), tmp_path / "run")
    guarded = results.methods[-1].seeds[0]
    assert 0.002 < max(drift for _, drift in guarded.drifts) <= 4 * 0.002
    assert all(outcome.perplexity_rise <= outcome.limit for outcome in guarded.guarded)


def test_an_adapter_for_each_task_has_a_calibration_and_an_equal_share(guarded_path, tmp_path, monkeypatch):
    given = []
    begin = GuardPlugin.before_task

    def before(self, context):
        begin(self, context)
        given.append((self.guard.budget, self.calibration, set(self.guard.parameters), self.drift()))

    monkeypatch.setattr(GuardPlugin, "before_task", before)
    content = yaml.safe_load(guarded_path.read_text())
    content["methods"] = [{**content["methods"][-1], "adapter_per_task": True}]
    guarded_path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(guarded_path)
    results = run_recipe(recipe, tmp_path / "run")
    (budget, first, _, start), (other_budget, second, _, later) = given
    assert budget == other_budget == pytest.approx(math.log1p(0.001))
    assert first is not second
    assert not given[0][2] & given[1][2]
    guarded = results.methods[-1].seeds[0]
    assert (start, later) == (0.0, guarded.guarded[0].predicted)  # the prediction includes earlier tasks
    assert guarded.guarded[1].predicted <= later + budget * (1 + 1e-3)
    assert [outcome.limit for outcome in guarded.guarded] == [0.001, 0.002]
    text = guard_text(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    before_it = measure(base, text).perplexity
    folder = tmp_path / "run/guarded/seed-0/adapter"
    adapted = PeftModel.from_pretrained(base, folder / "task0", adapter_name="task0")
    adapted.load_adapter(folder / "task1", "task1")
    adapted.base_model.set_adapter(["task0", "task1"])
    rise = measure(adapted, text).perplexity / before_it - 1
    assert rise == pytest.approx(guarded.guarded[-1].perplexity_rise, abs=1e-5)
    assert guarded.guarded[-1].predicted > 0  # because it was trained, even if the text's perplexity fell
    assert rise <= 0.002


@pytest.mark.parametrize("task", [0, 1])
def test_cut_off_while_learning_a_task_and_gone_on_with(guarded_path, tmp_path, monkeypatch, task):
    content = yaml.safe_load(guarded_path.read_text())
    content["training"] = {**content.get("training", {}), "logging_steps": 1, "checkpoint_steps": 1}
    guarded_path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(guarded_path)
    whole = run_recipe(recipe, tmp_path / "whole")
    learn = MethodRun._learn

    def cut(self, part):
        if part.number == task and self.method.name == "guarded":
            seen = []

            def save(trainer, *arguments):
                saving(trainer, *arguments)
                seen.append(1)
                if len(seen) == 2:
                    raise Cut

            saving = TaskTrainer._save_checkpoint
            monkeypatch.setattr(TaskTrainer, "_save_checkpoint", save)
        learn(self, part)

    monkeypatch.setattr(MethodRun, "_learn", cut)
    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "cut")
    assert len(list((tmp_path / "cut/guarded/seed-0").glob(f"checkpoints/task-{task}/checkpoint-*"))) == 1
    monkeypatch.undo()
    assert figures(run_recipe(recipe, tmp_path / "cut")) == figures(whole)


def test_what_looks_at_the_weights_sees_them_within_the_budget(guarded_path, tmp_path, monkeypatch):
    """EWC stores the parameters after the guard has scaled them back, whichever plug-in is named first."""
    content = yaml.safe_load(guarded_path.read_text())
    guarded = content["methods"][-1]
    guarded["plugins"] = [{"name": "ewc", "strength": 1.0, "examples": 4}, *guarded["plugins"]]
    content["methods"] = [guarded]
    content["tasks"] = content["tasks"][:1]
    guarded_path.write_text(yaml.safe_dump(content))
    begin = GuardPlugin.before_task

    def without_prediction(self, context):
        begin(self, context)
        self.guard.budget = None  # so the change must be scaled back after the task

    monkeypatch.setattr(GuardPlugin, "before_task", without_prediction)
    seen = []
    merge = Consolidated.merge
    monkeypatch.setattr(Consolidated, "merge", lambda self, *given: (seen.append(given[-1]), merge(self, *given)))
    results = run_recipe(load_recipe(guarded_path), tmp_path / "run")
    assert results.methods[-1].seeds[0].guarded[0].scale < 1  # else the order would make no difference
    saved = load_file(tmp_path / "run/guarded/seed-0/adapter/adapter_model.safetensors")
    kept = sorted(value.norm().item() for name, value in saved.items() if name.endswith("curlora_U.weight"))
    assert sorted(value.norm().item() for value in seen) == pytest.approx(kept)


def test_refused_before_anything_is_loaded(guarded_path):
    content = yaml.safe_load(guarded_path.read_text())
    guarded = content["methods"][-1]
    guard = guarded["plugins"][0]
    for plugins, message in (
        ([guard, guard], "'guard' is listed twice"),
        ([{**guard, "max_perplexity_increase": 0}], "max_perplexity_increase must be a positive share, .*, got"),
        ([{**guard, "slack": 0}], "positive slack"),
        ([{**guard, "batch_size": 0}], "batch_size of 1 or more"),
        ([{**guard, "spread": "yes"}], "spread must be true or false"),
        ([{"name": "anchors"}], "protects what earlier tasks have trained"),
        ([{"name": "ewc", "strength": 1}], "protects what earlier tasks have trained"),
    ):
        guarded["adapter_per_task"] = "protects" in message
        guarded["plugins"] = plugins
        guarded_path.write_text(yaml.safe_dump(content))
        with pytest.raises(RecipeError, match=message):
            load_recipe(guarded_path)


def test_a_window_that_the_model_has_no_positions_for_is_named(guarded_path, tmp_path):
    content = yaml.safe_load(guarded_path.read_text())
    content["guard"].update(window=100_000)
    config = json.loads((guarded_path.parent / "model/config.json").read_text())
    config["max_position_embeddings"] = 100
    (guarded_path.parent / "model/config.json").write_text(json.dumps(config))
    guarded_path.write_text(yaml.safe_dump(content))
    with pytest.raises(RunError, match="'more words' has windows of 256 tokens, but the model has only 100 positions"):
        run_recipe(load_recipe(guarded_path), tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "pissa"])
def test_the_penalty_is_toward_the_base_where_its_weights_were_changed(guarded_path, tmp_path, method):
    content = yaml.safe_load(guarded_path.read_text())
    lora = {"method": "lora", "options": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}}
    kind = lora if method == "pissa" else {"method": "full"}
    drifts = {}
    for strength in (1e-6, 1e3):
        plugins = [{"name": "kl_to_base", "strength": strength, "tokens": 64}]
        content["methods"] = [{"name": "held", "learning_rate": 0.01, "plugins": plugins, **kind}]
        guarded_path.write_text(yaml.safe_dump(content))
        results = run_recipe(load_recipe(guarded_path), tmp_path / f"{strength}")
        drifts[strength] = next(iter(results.methods[-1].seeds[0].heldout.values()))[-1].drift
    assert 0 < drifts[1e3] < 0.5 * drifts[1e-6]


def test_the_penalty_is_the_drift_from_the_base_on_a_piece_of_the_text(guarded_path):
    adapted = curlora(llama()).train()
    model = TaskModel(adapted)
    text = HeldOut("words", tokens(batch=1, length=24)[0])

    def base_logits(ids, kept):
        with adapted.disable_adapter():
            return adapted(input_ids=ids, logits_to_keep=kept).logits

    plugin = KLToBasePlugin(strength=3.0, tokens=8)
    plugin.before_task(TaskContext(0, model, [], lambda rows: {}, 0, text, base_logits))
    assert sorted(row.tolist() for row, _ in plugin.pieces) == sorted(row.tolist() for row in text.tokens.split(8))
    for number in range(4):
        plugin.step = number
        piece = HeldOut("piece", plugin.pieces[number % 3][0])
        expected = 3.0 * measure(adapted, piece, base_logits).drift
        penalty = plugin.penalty(model)
        assert float(penalty.detach()) == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone_parameters())
    assert model.training


def test_the_penalty_goes_by_the_rows_that_the_base_wrote_one_by_one():
    adapted = curlora(llama()).double().train()  # a divergence of 1e-6 is not rounded away
    lengths, prompts = (9, 14, 6), (4, 3, 2)
    counted = tuple(torch.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True))
    text = Answers("own", tokens(batch=1, length=sum(lengths))[0], counted=counted)

    def base_logits(ids, kept):
        with adapted.disable_adapter():
            return adapted(input_ids=ids, logits_to_keep=kept).logits

    plugin = KLToBasePlugin(strength=3.0, tokens=16)
    plugin.before_task(TaskContext(0, TaskModel(adapted), [], lambda rows: {}, 0, text, base_logits))
    order = [i for row, _ in plugin.pieces for i, one in enumerate(text.as_rows()) if torch.equal(row, one)]
    assert sorted(order) == [0, 1, 2]
    for number, i in enumerate([*order, order[0]]):
        plugin.step = number
        row = Answers("row", text.as_rows()[i], counted=counted[i : i + 1])
        expected = 3.0 * measure(adapted, row, base_logits).drift
        assert float(plugin.penalty(TaskModel(adapted)).detach()) == pytest.approx(expected, rel=1e-4)
    single = []
    for plugin.step in (2, 3):  # the rows of the second step, if each step takes two
        _, counted = plugin.pieces[plugin.step % 3]
        single.append((float(plugin.penalty(TaskModel(adapted)).detach()), int(counted[1:].sum())))
    plugin.rows_per_step, plugin.step = 2, 1
    expected = sum(found * count for found, count in single) / sum(count for _, count in single)
    assert float(plugin.penalty(TaskModel(adapted)).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"strength": 0}, {"strength": 1, "tokens": 1}, {"strength": 1, "rows_per_step": 0}])
def test_the_penalty_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ValueError, match="kl_to_base needs"):
        KLToBasePlugin(**wrong)
