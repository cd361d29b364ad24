"""Columns and rows are chosen for a stream's first task, on a small model."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curlora import redraw
from curlora.continual import load_recipe, run_recipe
from curlora.continual.batches import Collator
from curlora.continual.heldout import HeldOut
from curlora.continual.method_run import MethodRun
from curlora.continual.plugins import RedrawPlugin, TaskContext
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from tests.continual.streams import Cut, figures
from tests.models import curlora, layers, llama, tokens, word_examples, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The guard's text has")

TEXT = HeldOut("words", tokens(seed=1, batch=1, length=48)[0], window=16)


def indices(model):
    return {layer.name: layer.basis("default").indices.clone() for layer in layers(model)}


def untrained():
    model = curlora(llama())
    for layer in layers(model):
        layer.curlora_U["default"].weight.data.zero_()
    return TaskModel(model)


def context(model, classes, number=0, text=TEXT):
    """The rows of a small task: texts with a class, or texts to continue."""
    tokenizer = word_tokenizer()
    rows = []
    for words, label in word_examples(2)[0]:
        ids = tokenizer(words)["input_ids"]
        rows.append({"input_ids": ids, "labels": label if classes else [-100, *ids[1:]], "task": number})
    model.begin(number, classes)
    return TaskContext(number, model, rows, Collator(tokenizer), seed=0, guard_text=text)


@pytest.mark.parametrize("classes", [2, None])
def test_it_is_redraw_with_the_tasks_loss(classes, monkeypatch):
    given = []

    def seen(model, batches, general, **options):
        given.append((model, batches, general, options))
        with torch.no_grad():
            total = sum(float(options["loss"](batch)) * len(batch["task"]) for batch in batches)
        given.append((total / sum(len(batch["task"]) for batch in batches), copy.deepcopy(task.model.heads)))
        redraw(model, batches, general, **options)

    monkeypatch.setattr("curlora.continual.plugins.redraw_plugin.redraw", seen)
    model = untrained()
    drawn = indices(model)
    task = context(model.train(), classes)
    fresh = {key: value.clone() for key, value in model.heads.state_dict().items()}
    plugin = RedrawPlugin()
    before = torch.random.get_rng_state()
    plugin.before_task(task)
    (_, batches, general, _), (loss, heads) = given
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert sorted(lengths.tolist()) == sorted(len(row["input_ids"]) for row in task.rows)
    assert torch.equal(torch.cat(general), TEXT.tokens)
    assert torch.equal(torch.random.get_rng_state(), before)  # training's random numbers do not depend on it
    assert model.training
    if classes:
        assert loss < 0.8 * math.log(2)  # the fitted head separates the classes,
        assert {key: value.tolist() for key, value in model.heads.state_dict().items()} == {
            key: value.tolist() for key, value in fresh.items()
        }  # and training starts with an untrained one

    other = untrained()
    other.begin(0, classes)
    other.heads.load_state_dict(heads.state_dict())
    each = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["task"]))
    ]
    # One example at a time, with the same weight for every label.
    summed = lambda batch: other(**batch, num_items_in_batch=1)["loss"]  # noqa: E731
    redraw(other.language_model, each, general, loss=summed, seed=0, progress=False)
    assert all(torch.equal(at, indices(other)[name]) for name, at in indices(model).items())
    assert any(not torch.equal(at, drawn[name]) for name, at in indices(model).items())


def test_later_tasks_keep_what_there_is():
    model, plugin = untrained(), RedrawPlugin()
    plugin.before_task(context(model, 2))
    first = indices(model)
    for layer in layers(model):
        layer.curlora_U["default"].weight.data.normal_()
    plugin.before_task(context(model, 2, number=1))
    assert all(torch.equal(at, first[name]) for name, at in indices(model).items())


def test_a_text_that_says_nothing_is_named():
    with pytest.raises(ValueError, match="needs at least 2 tokens, got 1"):
        RedrawPlugin().before_task(context(untrained(), 2, text=HeldOut("word", TEXT.tokens[:1])))


@pytest.mark.parametrize("options", [{"examples": 0}, {"examples": 2.5}, {"examples": True}, {"batch_size": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="redraw needs"):
        RedrawPlugin(**options)


@pytest.fixture
def redrawn_path(recipe_path):
    content = yaml.safe_load(recipe_path.read_text())
    content["guard"] = {"name": "more words", "path": "text.txt", "tokens": 50, "window": 16}
    content["heldout"]["path"] = "more.txt"
    plugins = [{"name": "guard", "max_perplexity_increase": 0.5}, {"name": "redraw", "examples": 16}]
    content["methods"] = [{**content["methods"][-1], "name": "redrawn", "learning_rate": 0.05, "plugins": plugins}]
    content["training"].update(checkpoint_steps=2, logging_steps=1, forward_transfer=True)
    recipe_path.write_text(yaml.safe_dump(content))
    return recipe_path


@pytest.mark.parametrize(("cut", "per_task"), [("learning 0", False), ("scoring 0", True), ("learning 1", True)])
def test_cut_off_and_gone_on_with(redrawn_path, tmp_path, monkeypatch, cut, per_task):
    recipe = load_recipe(redrawn_path, [f"methods.0.adapter_per_task={per_task}"])
    whole = run_recipe(recipe, tmp_path / "whole")
    what, number = cut.split()
    running = []  # the method and the task that is being learned
    learn = MethodRun._learn

    def learning(run, part):
        running.append(f"{run.method.name} {part.number}")
        learn(run, part)

    monkeypatch.setattr(MethodRun, "_learn", learning)
    owner, name = (MethodRun, "_score") if what == "scoring" else (TaskTrainer, "_save_checkpoint")
    then = getattr(owner, name)

    def cutting(*arguments):
        if what == "scoring" and running[-1] == f"redrawn {number}":
            raise Cut
        then(*arguments)
        if running[-1] == f"redrawn {number}":
            raise Cut

    monkeypatch.setattr(owner, name, cutting)
    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "cut")
    monkeypatch.undo()
    if not per_task or number == "1":  # else another adapter is still to be redrawn
        # On another machine the choice might differ, so a resumed run must not choose again.
        monkeypatch.setattr("curlora.continual.plugins.redraw_plugin.redraw", None)
    assert figures(run_recipe(recipe, tmp_path / "cut")) == figures(whole)
    folders = [Path("redrawn/seed-0/adapter", part) for part in (["task0", "task1"] if per_task else [""])]
    for folder in folders:
        adapters = [load_file(tmp_path / run / folder / "adapter_model.safetensors") for run in ("whole", "cut")]
        assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
    # The choice is in the saved file, so loading the adapter restores it.
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    loaded = PeftModel.from_pretrained(base, tmp_path / "cut" / folders[0])
    drawn = indices(curlora(AutoModelForCausalLM.from_pretrained(recipe.model.name), seed=0))
    assert any(not torch.equal(at, drawn[name]) for name, at in indices(loaded).items())
