"""Perplexity on held-out text, and drift from the base model there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from curlora.continual.results import TextScore
from curlora.text.perplexity import score_text
from curlora.text.progress import Shown
from curlora.text.rows import Rows

__all__ = ["HeldOut", "measure"]


@dataclass(frozen=True)
class HeldOut:
    """A text whose perplexity is measured.

    Args:
        name: the text's name in reports; unique in a run.
        tokens: the text, shape ``(length,)``.
        window: tokens of a forward pass.
        stride: tokens from the start of one window to the next; ``window`` if ``None``.
        shown: whether methods may use the text, as plug-ins use the guard's text.

    Raises:
        ValueError: on fewer than two tokens, or a stride outside ``1..window``.
    """

    name: str
    tokens: Tensor = field(repr=False)
    window: int = 512
    stride: int | None = None
    shown: bool = False

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise ValueError(f"perplexity needs at least 2 tokens, got {len(self.tokens)}")
        if self.window < 2 or not 1 <= self.step <= self.window:
            raise ValueError(
                "perplexity needs 1 <= stride <= window and window >= 2, got "
                f"stride={self.step} and window={self.window}"
            )

    @property
    def step(self) -> int:
        """Tokens from the start of one window to the next."""
        return self.window if self.stride is None else self.stride

    @property
    def windows(self) -> int:
        """The number of forward passes that scoring takes."""
        return len(self.as_rows())

    @property
    def longest(self) -> int:
        """Tokens of the longest forward pass."""
        return min(self.window, len(self.tokens))

    def as_rows(self) -> Rows:
        """Return one row for each forward pass, with the mask of the tokens that are scored.

        A window starts every ``stride`` tokens and scores the tokens that no earlier window has scored.
        """
        windows, masks, last = [], [], 0
        for begin in range(0, len(self.tokens), self.step):
            end = min(begin + self.window, len(self.tokens))
            new = end - 1 - max(last, begin)
            if new > 0:
                windows.append(self.tokens[begin:end])
                masks.append(torch.arange(end - begin, device="cpu") >= end - begin - new)
                last = end - 1
            if end == len(self.tokens):
                break
        return Rows(windows, masks)

    def pieces(self, length: int = 128) -> Sequence[Tensor]:
        """Split the text into rows of ``length`` tokens, or of ``window`` tokens if that is less, for calibration."""
        return self.tokens.split(min(length, self.window))

    def describe(self) -> str:
        """Describe the text and how it is scored."""
        how = "one chunk" if self.windows == 1 else f"windows of {self.window:,}, stride {self.step:,}"
        return f"{self.name} ({len(self.tokens):,} tokens, {how})"


def measure(
    model: nn.Module,
    text: HeldOut,
    base_logits: Callable[[Tensor, int], Tensor] | None = None,
    progress: Shown = False,
) -> TextScore:
    """Measure the perplexity on a text and the drift from a base model (:func:`curlora.text.perplexity.score_text`).

    The tokens of a window are scored given all earlier tokens of the window
    (https://huggingface.co/docs/transformers/perplexity). If ``stride`` equals ``window``, the first token of every
    window is not scored, because no token precedes it.

    Args:
        model: a causal language model of transformers, with or without adapters.
        text: the text to score.
        base_logits: given ``input_ids`` of shape ``(1, length)`` and a number ``k``, returns the base model's logits at
            the last ``k`` positions, shape ``(1, k, vocabulary)``. If ``None``, drift is not measured and reported as
            0.
        progress: see :func:`curlora.calibrate`.

    Returns:
        Perplexity and drift.
    """
    perplexity, drift = score_text(
        model, text.as_rows(), base_logits=base_logits, max_length=text.longest, batch_size=1, progress=progress
    )
    return TextScore(perplexity=perplexity, drift=drift)
