"""Scale each task's change of the model back until the forgetting on a general text is within a limit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from curlora.continual.heldout import HeldOut, measure
from curlora.continual.plugins.base import Plugin, TaskContext
from curlora.continual.results import Guarded, TextScore
from curlora.guard.measured_limit import MeasuredLimit, NothingKeptWarning
from curlora.guard.share import as_share

__all__ = ["ScaleBackPlugin"]


class _Limit(TypedDict):
    """The arguments of a :class:`curlora.guard.measured_limit.MeasuredLimit`."""

    measure: Callable[[], float]
    max_rise: float
    at_start: float


class ScaleBackPlugin(Plugin):
    """Limits any method's forgetting on the recipe's ``guard`` text, by measuring it after each task.

    The parameters that the task trained, without heads, are moved back on the straight line to their values before the
    task until the limit is met, as by :class:`curlora.callbacks.ScaleBackCallback`. This is the last step of a guard
    without its constraint during training: the simplest baseline that keeps a limit. It holds a copy of the trainable
    parameters.

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
        self.held: MeasuredLimit | None = None
        self.score: TextScore | None = None  # the last measurement

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
        parameters = list(context.model.backbone_parameters())
        limit = self.measured(context)
        self.held = MeasuredLimit(context.model.language_model, lambda: parameters, **limit) if parameters else None

    def measured(self, context: TaskContext) -> _Limit:
        """Return the limit after this task as a measure and its largest rise.

        Before the first task this also measures the base model's perplexity on the text.
        """
        model, text, base_logits = context.model.language_model, text_of(context), context.base_logits
        if math.isnan(self.base_perplexity):
            self.base_perplexity = measure(model, text).perplexity

        def lost() -> float:
            self.score = measure(model, text, base_logits if self.limits_kl else None)
            return math.exp(self.score.drift) if self.limits_kl else self.score.perplexity

        limit = self.limit_after(context.number + 1, context.tasks)
        # A divergence begins at 0, and the exponential of the divergence at 1.
        return _Limit(
            measure=lost,
            max_rise=math.expm1(limit) if self.limits_kl else limit,
            at_start=1.0 if self.limits_kl else self.base_perplexity,
        )

    def after_task(self, context: TaskContext) -> Guarded | None:
        if self.held is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingKeptWarning)  # the run warns of it, and names the method
            self.held.finish()
        assert self.held.kept is not None
        assert self.score is not None
        # The last measurement is that of the parameters that were kept.
        return Guarded(
            perplexity_rise=self.score.perplexity / self.base_perplexity - 1,
            kl=self.score.drift if self.limits_kl else None,
            limit=self.limit_after(context.number + 1, context.tasks),
            scale=self.held.kept.scale,
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"base_perplexity": torch.tensor(self.base_perplexity, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.base_perplexity = float(state["base_perplexity"])


def text_of(context: TaskContext) -> HeldOut:
    """Return the recipe's general text, which must be there."""
    assert context.guard_text is not None
    return context.guard_text
