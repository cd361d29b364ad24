"""A task's head fitted by itself to the states of the model as it is: a linear probe.

Logistic regression with a ridge has one best answer, which L-BFGS finds: it depends on no learning rate, no order of
examples and no number of steps. A few hundred steps of Adam from a random start end well short of it on a language
model's states, a few entries of which are ten times as large as the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import IGNORED

__all__ = ["fit", "states_and_labels"]

_ITERATIONS = 200


def states_and_labels(model: TaskModel, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of rows with one label each.

    Args:
        model: as it is; in evaluation mode meanwhile.
        batches: of rows of one task with a head.

    Returns:
        The states that a head answers from, shape ``(n, width)``, at least float32, and the labels, shape ``(n,)``.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    states, labels = [], []
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        found = model.states(**batch)
        states.append(found.to(torch.promote_types(found.dtype, torch.float32)))
        labels.append(batch["labels"][batch["labels"] != IGNORED])
    model.train(training)
    return torch.cat(states), torch.cat(labels)


def fit(head: nn.Linear, states: Tensor, labels: Tensor, ridge: float = 0.1) -> None:
    """Make ``head`` the one that minimizes the mean cross-entropy plus ``ridge ||weight||²`` on standardized states.

    Args:
        head: of shape ``(classes, width)``; what it is before makes no difference.
        states: shape ``(n, width)``.
        labels: integers, shape ``(n,)``.
        ridge: positive. 0.1 was the best of 0.001 to 0.1 for a few hundred to a thousand examples.

    Raises:
        ValueError: if a state is not finite.
    """
    if not bool(states.isfinite().all()):
        raise ValueError("the model's states of the task are not finite")
    # Of a few hundred rows, and so on the CPU, where float64 is to be had: the same on every device.
    states, labels = states.cpu().double(), labels.cpu()
    mean, deviation = states.mean(0), states.std(0, correction=0)
    # An entry that never changes says nothing.
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)
    standard = (states - mean) * scale
    weight = torch.zeros(head.out_features, states.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(head.out_features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(standard @ weight.T + bias, labels) + ridge * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        unscaled = weight * scale
        head.weight.copy_(unscaled)
        head.bias.copy_(bias - unscaled @ mean)
