"""Heads that are fitted before both they and the model are trained, on a small model."""

import pytest
import torch
import yaml

from curlora.continual import load_recipe, probe, run_recipe
from curlora.continual.batches import Collator
from curlora.continual.errors import RunError
from curlora.continual.method_run import MethodRun
from curlora.continual.plugins import ProbePlugin, TaskContext
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import TaskTrainer
from tests.continual.streams import Cut, figures
from tests.models import llama, word_examples, word_tokenizer


def context(model, classes=2):
    tokenizer = word_tokenizer()
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "labels": label, "task": 0} for text, label in word_examples(2)[0]
    ]
    model.begin(0, classes)
    return TaskContext(0, model, rows, Collator(tokenizer), seed=0)


def test_the_head_is_the_fitted_one_whatever_the_batches():
    model = TaskModel(llama())
    task = context(model)
    ProbePlugin(ridge=0.3, batch_size=3).before_task(task)
    expected = torch.nn.Linear(model.heads["0"].in_features, 2)
    probe.fit(expected, *probe.states_and_labels(model, [task.collate(task.rows)]), ridge=0.3)
    assert torch.allclose(model.heads["0"].weight, expected.weight, atol=1e-4)
    assert torch.allclose(model.heads["0"].bias, expected.bias, atol=1e-4)
    assert all(p.requires_grad for p in model.heads["0"].parameters())


def test_a_task_without_a_head_is_left_alone():
    ProbePlugin().before_task(context(TaskModel(llama()), None))


def test_a_model_without_finite_states_is_named():
    model = TaskModel(llama())
    model.language_model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match="plug-in probe: the model's hidden states on the task's examples are not"):
        ProbePlugin().before_task(context(model))


@pytest.mark.parametrize("options", [{"ridge": 0}, {"ridge": float("inf")}, {"batch_size": 0}, {"batch_size": True}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="probe needs"):
        ProbePlugin(**options)


def test_training_begins_from_it_and_goes_on_from_where_it_was_cut_off(recipe_path, tmp_path, monkeypatch):
    content = yaml.safe_load(recipe_path.read_text())
    for method in content["methods"]:
        method["plugins"] = [{"name": "probe"}]
    content["training"].update(checkpoint_steps=2, logging_steps=1, head_learning_rate=1e-9)
    recipe_path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(recipe_path)
    whole = run_recipe(recipe, tmp_path / "whole")
    # The fitted heads stay good; the loss of untrained heads would start at log 2.
    assert all(loss < 0.1 for _, loss in whole.methods[0].seeds[0].losses)

    learn, save = MethodRun._learn, TaskTrainer._save_checkpoint
    running = []

    def learning(run, part):
        running.append((run.method.name, part.number))
        learn(run, part)

    def saving(trainer, *arguments):
        save(trainer, *arguments)
        if running[-1] == ("lora", 1):
            raise Cut

    monkeypatch.setattr(MethodRun, "_learn", learning)
    monkeypatch.setattr(TaskTrainer, "_save_checkpoint", saving)
    with pytest.raises(Cut):
        run_recipe(recipe, tmp_path / "cut")
    monkeypatch.undo()
    assert figures(run_recipe(recipe, tmp_path / "cut")) == figures(whole)
