"""Scale each task's change of the model back until the forgetting on a general text is within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from curlora.continual.heldout import HeldOut, measure
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.results import Guarded, TextScore
from curlora.guard import scale_to_limit
from curlora.guard.share import as_share

__all__ = ["ScaleBack"]


class ScaleBack(Plugin):
    """Limits any method's forgetting on the recipe's ``guard`` text, by measuring it after each task.

    The parameters that the task trained, without heads, are moved back on the straight line to their values before the
    task until the limit is met (:func:`curlora.guard.scale_to_limit`). This is the last step of a guard without its
    constraint during training: the simplest baseline that keeps a limit. It holds a copy of the trainable parameters.

    Args:
        max_perplexity_increase: the largest rise of the text's perplexity over the whole stream, relative to the base
            model: 0.01 for 1 %.
        max_kl: the alternative limit: the largest ``KL(base || model)`` on the text, in nats per token.
        spread: whether the limit grows in equal steps from task to task. If false, the first task may use all of it.

    Raises:
        ValueError: unless exactly one limit is given, if it is not positive, or if ``spread`` is not a boolean.
    """

    needs_guard_text: ClassVar[bool] = True

    def __init__(
        self, max_perplexity_increase: float | str | None = None, max_kl: float | None = None, spread: bool = True
    ) -> None:
        limits = {"max_perplexity_increase": max_perplexity_increase, "max_kl": max_kl}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise ValueError("give one limit: max_perplexity_increase or max_kl")
        ((name, value),) = given.items()
        if name == "max_kl":
            if not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"max_kl must be a positive number of nats per token, got {value!r}")
            self.limit = float(value)
        else:
            self.limit = as_share(name, value)
        if not isinstance(spread, bool):
            raise ValueError(f"spread must be true or false, got {spread!r}")
        self.limits_kl, self.spread = name == "max_kl", spread
        self.base_perplexity = math.nan
        self.parameters: list[Tensor] = []
        self.before: list[Tensor] = []

    def describe(self) -> dict[str, Any]:
        return {"name": "scale_back", **self.limits()}

    def limits(self) -> dict[str, Any]:
        """Return the options for the report."""
        return {"max_kl" if self.limits_kl else "max_perplexity_increase": self.limit, "spread": self.spread}

    def nats(self, context: TaskContext, since: int = 0) -> float:
        """Return the limit from before task number ``since`` to the end of this task, in nats per token."""
        limit = self.limit_after(context.number + 1 - since, context.tasks)
        return limit if self.limits_kl else math.log1p(limit)

    def limit_after(self, learned: int, tasks: int) -> float:
        """Return the limit after ``learned`` of the stream's ``tasks`` tasks."""
        return self.limit * learned / tasks if self.spread else self.limit

    def before_task(self, context: TaskContext) -> None:
        self.begin(context, list(context.model.backbone_parameters()))

    def begin(self, context: TaskContext, parameters: Sequence[Tensor]) -> None:
        """Copy ``parameters``; before the first task also measure the base model's perplexity on the text."""
        if math.isnan(self.base_perplexity):
            self.base_perplexity = measure(context.model.language_model, text_of(context)).perplexity
        self.parameters = list(parameters)
        self.before = [parameter.detach().clone() for parameter in parameters]

    def after_task(self, context: TaskContext) -> Guarded | None:
        limit = self.limit_after(context.number + 1, context.tasks)
        base_logits: Callable[[Tensor, int], Tensor] | None = context.base_logits if self.limits_kl else None
        if not self.parameters:
            return None
        found: dict[float, TextScore] = {}

        def lost() -> float:
            score = measure(context.model.language_model, text_of(context), base_logits)
            value = score.drift if self.limits_kl else score.perplexity / self.base_perplexity - 1
            found[value] = score
            return value

        scale, value = scale_to_limit(limit, lost, self.parameters, self.before)
        score = found.get(value)
        return Guarded(
            perplexity_rise=math.nan if score is None else score.perplexity / self.base_perplexity - 1,
            kl=value if self.limits_kl else None,
            limit=limit,
            scale=scale,
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"base_perplexity": torch.tensor(self.base_perplexity, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.base_perplexity = float(state["base_perplexity"])


def text_of(context: TaskContext) -> HeldOut:
    """Return the recipe's general text, which must be there."""
    assert context.guard_text is not None
    return context.guard_text
