"""Linear probe: fit a task's head to the hidden states of the unchanged model.

Logistic regression with a ridge penalty has a unique optimum, which L-BFGS finds. The result depends on no learning
rate, order of examples or number of steps. A few hundred steps of Adam from a random start do not reach it on a
language model's states, a few entries of which are ten times as large as the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from curlora.continual.task_model import TaskModel
from curlora.text.evaluating import evaluating
from curlora.text.rows import IGNORED

__all__ = ["fit", "states_and_labels"]

_ITERATIONS = 200


def states_and_labels(model: TaskModel, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of rows with one label each.

    Args:
        model: the model; set to evaluation mode meanwhile.
        batches: batches of rows of one task with a head.

    Returns:
        The states that the head classifies, shape ``(n, width)``, in float32 or float64, and the labels, shape
        ``(n,)``.
    """
    device = next(model.parameters()).device
    states, labels = [], []
    with evaluating(model):
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            found = model.states(**batch)
            states.append(found.to(torch.promote_types(found.dtype, torch.float32)))
            labels.append(batch["labels"][batch["labels"] != IGNORED])
    return torch.cat(states), torch.cat(labels)


def fit(head: nn.Linear, states: Tensor, labels: Tensor, ridge: float = 0.1) -> None:
    """Set ``head`` to the minimizer of the mean cross-entropy plus ``ridge ||weight||²`` on standardized states.

    Args:
        head: linear layer with a weight of shape ``(classes, width)``; its values before the call do not matter.
        states: hidden states, shape ``(n, width)``.
        labels: integer classes, shape ``(n,)``.
        ridge: weight of the penalty, positive. 0.1 was the best of 0.001 to 0.1 for a few hundred to a thousand
            examples.

    Raises:
        ValueError: if a state is not finite.
    """
    if not bool(states.isfinite().all()):
        raise ValueError(
            "the model's hidden states on the task's examples are not finite. Lower the learning rate: an earlier task "
            "may have diverged"
        )
    # There are only a few hundred rows. In float64 on the CPU the result is the same for every device.
    states, labels = states.cpu().double(), labels.cpu()
    mean, deviation = states.mean(0), states.std(0, correction=0)
    # A constant entry carries no information.
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
