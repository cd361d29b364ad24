"""A callback that scales a training's change back until the rise of a measure is within a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from curlora.guard.measured_limit import MeasuredLimit

__all__ = ["ScaleBackCallback"]


class ScaleBackCallback(MeasuredLimit):
    """Moves parameters back on the straight line to their values before training, until a measure is within a limit.

    This works for any model and any kind of training. It is the simplest way to keep a budget, because it only measures
    at the end: after the last step, before the last evaluation and checkpoint, and again if the best checkpoint was
    loaded. ``kept`` holds the share of the change that remains, and the measured rise. The callback stores a copy of
    the parameters, and a second one from the last step to the end of training.

    Make the callback before training begins, and before a checkpoint is loaded to resume from. The change is counted
    from the parameters at that moment; for a further training, from the end of the last one. The rise of the measure is
    always counted from that moment. It is measured when the first training begins, in the precision of the training.

    Args:
        model: the trained model.
        measure: measures the current model. The value is positive, and lower is better, such as
            ``lambda: curlora.guard.perplexity(model, texts, tokenizer)``.
        max_rise: the largest allowed relative rise of the measure: 0.01 for 1 %.
        parameters: the parameters to move back; all trained parameters of the model if ``None``. Leave out a new head:
            scaled back to its initial values, it would predict nothing.

    Raises:
        ValueError: if ``max_rise`` is not positive, or the model has no trained parameters; when training begins, if
            the measure is not positive and finite.
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
            raise ValueError("The model has no trained parameters: add its adapter before you make this callback.")
        super().__init__(model, lambda: moved, measure, max_rise)
