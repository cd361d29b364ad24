"""Gradients of answers that the model itself would give: what the Fisher information is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from curlora.continual.plugins.base import TaskContext
from curlora.continual.task_model import TaskModel

__all__ = ["diverged", "drawn_gradients", "examples_of", "trained"]


def drawn_gradients(
    model: TaskModel, batches: Iterator[dict[str, Tensor]], generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Of each batch, the gradient of the negative log-probability of drawn answers with respect to what is trained.

    The answers are drawn from the model's own predictions, as the Fisher information has it, not taken from the labels
    (the "empirical Fisher", https://arxiv.org/abs/1905.12558). The model is in evaluation mode meanwhile; its own
    gradients are left alone.

    Args:
        model: the model.
        batches: of one example each, where it is the gradients of examples that are wanted.
        generator: of the draws.

    Yields:
        By name of parameter, heads excepted, in its shape; zero where the answers do not depend on it.
    """
    parameters = dict(trained(model))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in batches:
            losses = []
            for answer in model.answers(**{key: value.to(device) for key, value in batch.items()}):
                drawn = torch.multinomial(answer.logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
                losses.append(
                    nn.functional.cross_entropy(answer.logits.float(), drawn[:, 0].to(device), reduction="sum")
                )
            found = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()), allow_unused=True)
            yield {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
            }
    finally:
        model.train(training)


def diverged(model: TaskModel) -> bool:
    """Whether what is trained is not finite any more, so that there is nothing to be held of it."""
    return not all(bool(parameter.isfinite().all()) for _, parameter in trained(model))


def examples_of(context: TaskContext, count: int) -> tuple[Iterator[dict[str, Tensor]], torch.Generator]:
    """Up to ``count`` of a task's training rows in random order, a batch each; and what goes on with the same seed."""
    generator = torch.Generator().manual_seed((context.seed * 1_000_003 + context.number) % 2**63)
    order = torch.randperm(len(context.rows), generator=generator)[:count].tolist()
    return (context.collate([context.rows[i]]) for i in order), generator


def trained(model: TaskModel) -> list[tuple[str, nn.Parameter]]:
    """What is trained beside the heads."""
    return [(name, p) for name, p in model.model.named_parameters() if p.requires_grad]
