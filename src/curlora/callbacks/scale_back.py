"""After a training what it changed is scaled back until a measure has risen no more than is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from curlora.guard.measured_limit import MeasuredLimit

__all__ = ["ScaleBackCallback"]


class ScaleBackCallback(MeasuredLimit):
    """Moves what a training changed back along the straight line to where it began, until a limit is kept.

    For any model and any way of training it: the simplest way to keep to a budget, by measuring at the end. After the
    last step, before the last evaluation and checkpoint; and again where the best checkpoint was loaded since.
    ``kept`` says how much of the change was kept, and the rise that was measured. It holds a copy of the parameters,
    and from the last step to the end of training a second one.

    Make it before training begins, also where a checkpoint is gone on from: the change is counted from there, and of a
    further training from where the last one ended. The measure counts from there for good.

    Args:
        model: that is trained.
        measure: of the model as it is at that moment, positive and the lower the better, such as
            ``lambda: curlora.guard.perplexity(model, texts, tokenizer)``.
        max_rise: the most that it may rise by, relatively: 0.01 for 1 %.
        parameters: that are moved back; all that the model trains if ``None``. Leave out a new head: scaled back it
            would answer nothing.

    Raises:
        ValueError: if ``max_rise`` or the measure is not positive, or nothing is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        measure: Callable[[], float],
        max_rise: float,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        moved = list(parameters if parameters is not None else (p for p in model.parameters() if p.requires_grad))
        if not moved:
            raise ValueError("The model trains nothing: make this callback when its adapter is on it.")
        super().__init__(model, lambda: moved, measure, max_rise)
        self.measure_start()
