"""The model's own answers to a task's examples: what the Fisher information is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from curlora.continual.plugins.base import TaskContext
from curlora.continual.task_model import TaskModel

__all__ = ["answering", "diverged", "examples_of", "trained"]


@contextlib.contextmanager
def answering(model: TaskModel, batches: Iterable[dict[str, Tensor]]) -> Iterator[Iterator[list[Tensor]]]:
    """The model's logits wherever a label stands, as :func:`curlora.callbacks.ewc.drawn_gradients` takes them.

    The model is in evaluation mode while it lasts.

    Args:
        model: the model.
        batches: of one example each, where it is the gradients of examples that are wanted.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        yield (
            [answer.logits for answer in model.answers(**{key: value.to(device) for key, value in batch.items()})]
            for batch in batches
        )
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
