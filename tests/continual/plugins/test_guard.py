"""The guard over a stream on a small model."""

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from curlora.continual import load_recipe, run_recipe
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.launch import build
from tests.continual.streams import figures
from tests.models import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")


@pytest.fixture
def guarded_path(recipe_path):
    """Plain CURLoRA, and the same with a budget that it would go over, on a text that the model itself wrote."""
    content = yaml.safe_load(recipe_path.read_text())
    model = AutoModelForCausalLM.from_pretrained(recipe_path.parent / "model")
    model.lm_head.weight.data *= 30  # a model with opinions
    model.save_pretrained(recipe_path.parent / "model")
    torch.manual_seed(0)
    rows = model.generate(
        torch.full((6, 1), 5), do_sample=True, max_new_tokens=64, min_new_tokens=64, suppress_tokens=[0, 1]
    )
    (recipe_path.parent / "guard.txt").write_text(word_tokenizer().decode(rows[:, 1:].flatten()))
    content["guard"] = {"name": "more words", "path": "guard.txt", "skip": 64, "tokens": 256, "window": 64}
    cur = {"name": "cur", "method": "curlora", "learning_rate": 0.5, "options": {"r": 4}}
    guard = {"name": "guard", "max_perplexity_increase": 0.002, "damping": 0.01}
    content["methods"] = [cur, {**cur, "name": "guarded", "plugins": [guard]}]
    recipe_path.write_text(yaml.safe_dump(content))
    return recipe_path


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
    assert [outcome.limit for outcome in guarded.guarded] == [0.002, 0.002]
    assert all(outcome.perplexity_rise <= 0.002 and 0 <= outcome.scale <= 1 for outcome in guarded.guarded)
    assert guarded.guarded[-1].perplexity_rise == pytest.approx(rises["guarded"], abs=1e-5)
    assert [step for step, _ in guarded.drifts] == [step for step, _ in guarded.losses]
    assert max(drift for _, drift in guarded.drifts) <= 0.002 * (1 + 1e-3)
    assert not frozen.guarded
    assert not plain.guarded
    assert not plain.drifts


def test_cut_off_after_a_task_and_gone_on_with(guarded_path, tmp_path, monkeypatch):
    recipe = load_recipe(guarded_path)
    whole = run_recipe(recipe, tmp_path / "whole")

    class Cut(BaseException):
        pass

    from curlora.continual.sequence import MethodRun

    score = MethodRun._score

    def cut(self, part):
        if part.number == 1 and self.method.name == "guarded":
            raise Cut
        score(self, part)

    monkeypatch.setattr(MethodRun, "_score", cut)
    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "cut")
    monkeypatch.undo()
    assert figures(run_recipe(recipe, tmp_path / "cut")) == figures(whole)


def test_the_penalty_is_the_drift_from_the_base_on_a_piece_of_the_text(guarded_path):
    from curlora.continual.plugins import TaskContext, TowardBase
    from curlora.continual.task_model import TaskModel
    from tests.models import curlora, llama, tokens

    adapted = curlora(llama()).train()
    model = TaskModel(adapted)
    text = HeldOut("words", tokens(batch=1, length=24)[0])
    plugin = TowardBase(strength=3.0, tokens=8)
    plugin.before_task(TaskContext(0, model, [], lambda rows: {}, 0, text))

    def base_logits(ids, kept):
        with adapted.disable_adapter():
            return adapted(input_ids=ids, logits_to_keep=kept).logits

    for number in range(4):
        plugin.step = number
        piece = HeldOut("piece", text.tokens[8 * (number % 3) :][:8])
        expected = 3.0 * measure(adapted, piece, base_logits).drift
        penalty = plugin.penalty(model)
        assert float(penalty.detach()) == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone_parameters())
    assert model.training
