"""Elastic weight consolidation: a penalty on changing the parameters that earlier tasks depend on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curlora.callbacks.penalty import PenaltyCallback, check_strength
from curlora.text.decoding import draw
from curlora.text.evaluating import evaluating
from curlora.text.rows import IGNORED
from curlora.tuner.weight import running_device

__all__ = ["Consolidated", "EWCCallback", "drawn_gradients", "fisher_diagonal"]


class EWCCallback(PenaltyCallback):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3).

    While a later task is learned, ``strength / 2 * sum_j sum_i F_j[i] (theta[i] - theta_j[i])**2`` is added to the
    loss. ``F_j`` is the diagonal of the Fisher information on task ``j``, and ``theta_j`` are the trained parameters
    at the end of this task. Call :meth:`remember` after each training, and use one callback for all of them.

    Args:
        strength: the paper's lambda.
        examples: the largest number of examples of each task that the Fisher information is computed on.
        seed: the seed of the answers that are drawn for it.

    Raises:
        ValueError: if ``strength`` or ``examples`` is not positive.
    """

    logged_as: ClassVar[str] = "ewc"

    def __init__(self, strength: float, examples: int = 200, seed: int = 0) -> None:
        super().__init__()
        check_strength(strength)
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"examples must be a whole number of 1 or more, got {examples!r}.")
        self.strength, self.examples = strength, examples
        self.generator = torch.Generator().manual_seed(seed)
        self.held = Consolidated()

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        penalty = self.held.penalty({name: p for name, p in model.named_parameters() if p.requires_grad})
        return None if penalty is None else self.strength * penalty

    def remember(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        """Add a learned task to the penalty.

        Args:
            model: the model at the end of the task; a causal language model or a classifier of transformers.
            batches: batches of the task's examples with ``labels``, for example ``trainer.get_train_dataloader()``.
                Answers are drawn from the model's own predictions wherever a label is not -100. The values of the
                labels are not used.

        Raises:
            ValueError: if there is no example, or a batch has no labels.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows = itertools.islice(_rows(batches), self.examples)
        with evaluating(model):
            fisher = fisher_diagonal(trained, ([_answered(model, row)] for row in rows), self.generator)
        self.held.add(trained, fisher)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the penalty's tensors by name, to be saved with the model."""
        return self.held.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the penalty's tensors with those of a :meth:`state_dict`."""
        self.held.load_state_dict(state)


class Consolidated:
    """A quadratic penalty for all tasks together, with two values for each parameter, however many tasks there are."""

    def __init__(self) -> None:
        self.curvature: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def add(self, trained: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> None:
        """Add a learned task to the penalty.

        Args:
            trained: the trained parameters at the end of the task, by name.
            fisher: the diagonals of their Fisher information by name.
        """
        for name, parameter in trained.items():
            self.merge(name, fisher[name], parameter.detach().float().clone())

    def merge(self, name: str, fisher: Tensor, value: Tensor) -> None:
        """Add ``1/2 fisher * (theta - value)**2`` to the penalty, up to a constant.

        Args:
            name: the parameter's name.
            fisher: its diagonal of the Fisher information, of its shape.
            value: its value at the end of the task, of its shape.
        """
        # Tensors that were read from a file may be on another device, if a resumed run begins here.
        old = self.curvature.get(name, torch.zeros_like(fisher)).to(fisher.device)
        centre = self.centre.get(name, value).to(fisher.device)
        total = old + fisher
        # Where the curvature is zero, the centre has no effect on the penalty.
        self.centre[name] = torch.where(total > 0, (old * centre + fisher * value) / total.clamp(min=1e-38), value)
        self.curvature[name] = total

    def penalty(self, trained: Mapping[str, Tensor]) -> Tensor | None:
        """Return ``1/2 sum of curvature (theta - centre)**2``, or ``None`` if there is no task yet.

        Args:
            trained: the current values of the trained parameters by name.

        Raises:
            ValueError: if other parameters are trained than in the earlier tasks.
        """
        if not self.curvature:
            return None
        if self.curvature.keys() != trained.keys():
            differs = sorted(self.curvature.keys() ^ trained.keys())
            raise ValueError(
                f"Other parameters are trained than in the earlier tasks: {differs[:3]} are in only one of the two. "
                "Train the same parameters, or make a new callback."
            )
        for held in (self.curvature, self.centre):  # moves them only once, after they were read from a file
            held.update({name: held[name].to(parameter.device) for name, parameter in trained.items()})
        terms = [(self.curvature[name] * (p - self.centre[name]) ** 2).sum() for name, p in trained.items()]
        return 0.5 * torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {
            **{f"curvature.{name}": value for name, value in self.curvature.items()},
            **{f"centre.{name}": value for name, value in self.centre.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tensors with those of a :meth:`state_dict`."""
        for part, held in (("curvature.", self.curvature), ("centre.", self.centre)):
            held.clear()
            held.update({key.removeprefix(part): value for key, value in state.items() if key.startswith(part)})


def fisher_diagonal(
    trained: Mapping[str, Tensor], answered: Iterable[Sequence[Tensor]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information: the mean of ``(d log p(y) / d theta)**2`` over examples.

    Args:
        trained, generator: see :func:`drawn_gradients`.
        answered: see :func:`drawn_gradients`; each batch is one example.

    Returns:
        The diagonal by the parameters' names, float32, of the parameters' shapes.

    Raises:
        ValueError: if there is no example.
    """
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trained.items()}
    count = 0
    for gradients in drawn_gradients(trained, answered, generator):
        for name, gradient in gradients.items():
            total[name] += gradient.float() ** 2
        count += 1
    if not count:
        raise ValueError("There is no example to compute the Fisher information on: pass at least one batch.")
    return {name: value / count for name, value in total.items()}


def drawn_gradients(
    trained: Mapping[str, Tensor], answered: Iterable[Sequence[Tensor]], generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield for each batch the gradient of the negative log-probability of drawn answers.

    The answers are drawn from the model's own predictions, as the Fisher information is defined. Answers from the
    labels would give the "empirical Fisher" (https://arxiv.org/abs/1905.12558). The ``grad`` of the parameters is left
    unchanged.

    Args:
        trained: the parameters by name.
        answered: for each batch, the logits at all answers, in parts of shape ``(n, classes)``.
        generator: the random generator of the draws, on the CPU.

    Yields:
        The gradients by the parameters' names, of the parameters' shapes; zero if the answers do not depend on a
        parameter.
    """
    for parts in answered:
        losses = []
        for logits in parts:
            drawn = draw(logits.detach().float().softmax(-1).cpu(), torch.rand(len(logits), generator=generator))
            losses.append(nn.functional.cross_entropy(logits.float(), drawn.to(logits.device), reduction="sum"))
        found = torch.autograd.grad(torch.stack(losses).sum(), list(trained.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(trained.items(), found, strict=True)
        }


def _rows(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each example as a batch of its own."""
    for batch in batches:
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(
                f"EWC needs batches with labels, which mark where the model answers; found the keys {sorted(batch)}. "
                "Add labels to the batches."
            )
        count = len(batch["labels"])
        for row in range(count):
            yield {
                key: value[row : row + 1] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
                for key, value in batch.items()
            }


def _answered(model: nn.Module, row: Mapping[str, Any]) -> Tensor:
    """Return the logits wherever a label is not -100, shape ``(n, classes)``."""
    device = running_device(model)
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in row.items()}
    labels = moved.pop("labels")
    logits: Tensor = model(**moved).logits
    if logits.ndim == 2:
        return logits[labels != IGNORED]
    return logits[:, :-1][labels[:, 1:] != IGNORED]  # a causal model predicts the next token
