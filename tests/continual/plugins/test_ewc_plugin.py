"""EWC on problems with a known answer."""

import pytest
import torch
from torch import nn

from curlora.callbacks.ewc import fisher_diagonal
from curlora.continual.batches import Collator
from curlora.continual.plugins import EWCPlugin, make_plugin
from curlora.continual.plugins.drawn import answering, trained
from curlora.continual.task_model import TaskModel
from tests.models import llama, word_tokenizer


class Toy(nn.Module):
    """The part of a TaskModel that EWC uses, for a logistic regression on fixed features."""

    def __init__(self, weight):
        super().__init__()
        self.model = nn.Module()
        self.model.weight = nn.Parameter(torch.tensor(weight))

    def answers(self, features):
        from curlora.continual.task_model import Answers

        logits = torch.stack([features @ self.model.weight, torch.zeros(len(features))], dim=-1)
        return [Answers(torch.arange(len(features)), logits, torch.zeros(len(features), dtype=torch.long))]


def fisher_of(model, batches):
    with answering(model, batches) as answered:
        return fisher_diagonal(dict(trained(model)), answered, torch.Generator().manual_seed(0))


def test_the_fisher_information_of_a_logistic_regression():
    """F = E[p (1 - p) x^2], since sampled answers average out."""
    model = Toy([0.7, -1.2])
    features = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.3]])
    p = torch.sigmoid(features @ model.model.weight.detach())
    expected = ((p * (1 - p))[:, None] * features**2).mean(0)
    batches = ({"features": row[None]} for _ in range(4000) for row in features)
    got = fisher_of(model, batches)["weight"]
    torch.testing.assert_close(got, expected, rtol=0.06, atol=0)


def test_the_optimum_of_quadratic_tasks_is_the_weighted_mean():
    """Each task's loss is F (theta - theta_k)^2 / 2. With EWC the last task ends at the mean weighted by curvature."""
    rng = torch.Generator().manual_seed(1)
    curvature, optimum = torch.rand(3, 5, generator=rng) + 0.1, torch.randn(3, 5, generator=rng)
    ewc = EWCPlugin(strength=1.0)
    model = Toy([0.0] * 5)
    for k in range(2):
        ewc.held.merge("weight", curvature[k], optimum[k])
    optimizer = torch.optim.LBFGS([model.model.weight], line_search_fn="strong_wolfe", max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (curvature[2] * (model.model.weight - optimum[2]) ** 2).sum() + ewc.penalty(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (curvature * optimum).sum(0) / curvature.sum(0)
    torch.testing.assert_close(model.model.weight.data, expected, rtol=1e-4, atol=1e-5)


def test_merging_tasks_is_the_sum_of_their_penalties_up_to_a_constant():
    rng = torch.Generator().manual_seed(2)
    curvature, value = torch.rand(4, 6, generator=rng), torch.randn(4, 6, generator=rng)
    curvature[:, 0] = 0  # a parameter that matters to no task
    ewc = EWCPlugin(strength=3.0)
    for k in range(4):
        ewc.held.merge("weight", curvature[k], value[k])

    def difference(penalty):
        model = Toy([0.0] * 6)
        at_zero = penalty(model)
        model.model.weight.data = torch.arange(6.0)
        return penalty(model) - at_zero

    pairs = list(zip(curvature, value, strict=True))
    direct = difference(lambda m: 1.5 * sum((c * (m.model.weight - v) ** 2).sum() for c, v in pairs))
    torch.testing.assert_close(difference(ewc.penalty), direct, rtol=1e-4, atol=1e-4)


def test_heads_are_not_held_and_gradients_are_left_alone():
    tokenizer = word_tokenizer()
    model = TaskModel(llama())
    model.begin(0, 2)
    row = {"input_ids": tokenizer("w1 w2 w3")["input_ids"], "labels": 1, "task": 0}
    fisher = fisher_of(model, [Collator(tokenizer)([row])])
    assert set(fisher) == {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    assert fisher["model.layers.0.self_attn.q_proj.weight"].sum() > 0
    assert (fisher["lm_head.weight"] == 0).all()  # a head answers, not the language model


def test_its_state_is_what_it_holds():
    ewc = EWCPlugin(strength=1.0)
    ewc.held.merge("weight", torch.rand(3), torch.rand(3))
    other = EWCPlugin(strength=1.0)
    other.load_state_dict(ewc.state_dict())
    model = Toy([0.1, 0.2, 0.3])
    assert torch.equal(other.penalty(model), ewc.penalty(model))
    assert EWCPlugin(strength=1.0).penalty(model) is None


def test_what_was_read_from_a_file_goes_to_where_the_model_is():
    """Also in a run that is resumed after a task, before the penalty was computed."""
    ewc = EWCPlugin(strength=1.0)
    ewc.held.merge("weight", torch.ones(2), torch.ones(2))
    ewc.held.merge("weight", *torch.ones(2, 2, device="meta"))
    assert ewc.held.curvature["weight"].device.type == ewc.held.centre["weight"].device.type == "meta"


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 1.0, "examples": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="ewc needs a positive strength"):
        make_plugin("ewc", options)
