"""Anchors over a stream on a small model."""

import pytest
import torch
from torch.nn.functional import kl_div

from curlora.continual.batches import Collator
from curlora.continual.plugins import AnchorsPlugin, EWCPlugin, TaskContext, make_plugin
from curlora.continual.task_model import TaskModel
from tests.models import curlora, llama, word_tokenizer


def task_model():
    # A random model's outputs hardly depend on queries, so other layers are adapted.
    model = TaskModel(curlora(llama(), target_modules=["v_proj", "o_proj"], layers_to_transform=[0]).double())
    model.begin(0, 3)
    model.double()
    model.heads["0"].weight.data.mul_(20)  # sharpens the head's predictions
    tokenizer = word_tokenizer()
    texts = [" ".join(f"w{(7 * i + 3 * j) % 90}" for j in range(5)) for i in range(200)]
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": 1, "task": 0} for text in texts]
    return model.eval(), rows, Collator(tokenizer)


def test_the_penalty_is_the_divergence_of_the_earlier_tasks_answers():
    model, rows, collate = task_model()
    plugin = AnchorsPlugin(strength=2.0, examples=200)
    assert plugin.penalty(model) is None
    plugin.after_task(TaskContext(0, model, rows, collate, seed=0))

    def log_p():
        with torch.no_grad():
            (answer,) = model.answers(**collate(rows))
        return answer.logits.double().log_softmax(-1)

    before = log_p()
    mixings = [p for name, p in model.model.named_parameters() if "curlora_U" in name]
    ratios = []
    for seed in range(6):
        moved = [p.detach().clone() for p in mixings]
        generator = torch.Generator().manual_seed(seed)
        U = mixings[seed % len(mixings)]
        U.data += 1e-3 * torch.randn(U.shape, generator=generator, dtype=U.dtype)
        measured = float(kl_div(log_p(), before, reduction="batchmean", log_target=True))
        ratios.append(measured / (float(plugin.penalty(model)) / 2.0))
        for p, was in zip(mixings, moved, strict=True):
            p.data.copy_(was)
    # One sampled answer per example and a Kronecker product: only the size is right.
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    assert 0.6 < sum(ratios) / len(ratios) < 1.6, ratios


def test_its_state_is_what_it_holds():
    model, rows, collate = task_model()
    model.train()
    plugin, other = AnchorsPlugin(), AnchorsPlugin()
    plugin.after_task(TaskContext(0, model, rows[:5], collate, seed=0))
    other.load_state_dict(plugin.state_dict())
    for name, p in model.model.named_parameters():
        if "curlora_U" in name:
            p.data += 0.1
    assert float(plugin.penalty(model)) > 0
    assert torch.equal(other.penalty(model), plugin.penalty(model))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("plugin", [AnchorsPlugin(), EWCPlugin(strength=1.0)])
def test_of_a_model_that_diverged_nothing_is_held(plugin):
    model, rows, collate = task_model()
    next(p for name, p in model.model.named_parameters() if "curlora_U" in name).data[0, 0] = torch.nan
    plugin.after_task(TaskContext(0, model, rows[:3], collate, seed=0))
    assert plugin.penalty(model) is None


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 1.0, "examples": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="anchors needs a positive strength"):
        make_plugin("anchors", options)
