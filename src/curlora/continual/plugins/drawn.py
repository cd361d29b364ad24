"""The model's answers to a task's examples, from which the Fisher information is estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from curlora.continual.plugins.base import TaskContext
from curlora.continual.task_model import TaskModel
from curlora.text.evaluating import evaluating

__all__ = ["answering", "diverged", "examples_of", "trained"]


@contextlib.contextmanager
def answering(model: TaskModel, batches: Iterable[dict[str, Tensor]]) -> Iterator[Iterator[list[Tensor]]]:
    """Yield the model's logits at labelled positions, as :func:`curlora.callbacks.ewc.drawn_gradients` takes them.

    The model is in evaluation mode within the context.

    Args:
        model: the model.
        batches: the batches; of one example each if per-example gradients are needed.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        yield (
            [answer.logits for answer in model.answers(**{key: value.to(device) for key, value in batch.items()})]
            for batch in batches
        )


def diverged(model: TaskModel) -> bool:
    """Whether a trained parameter is not finite, so that there is nothing to protect."""
    return not all(bool(parameter.isfinite().all()) for _, parameter in trained(model))


def examples_of(context: TaskContext, count: int) -> tuple[Iterator[dict[str, Tensor]], torch.Generator]:
    """Return batches of one random training row each, at most ``count``, and the generator that drew their order."""
    generator = torch.Generator().manual_seed(context.choice_seed)
    order = torch.randperm(len(context.rows), generator=generator)[:count].tolist()
    return (context.collate([context.rows[i]]) for i in order), generator


def trained(model: TaskModel) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters without the heads, by name."""
    return [(name, p) for name, p in model.model.named_parameters() if p.requires_grad]
