"""Perplexity on held-out text, and drift from the base model there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from curlora.continual.processes import process_state
from curlora.continual.results import TextScore
from curlora.guard.evaluating import evaluating

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
        return len(self.scored())

    @property
    def longest(self) -> int:
        """Tokens of the longest forward pass."""
        return min(self.window, len(self.tokens))

    def scored(self) -> list[tuple[Tensor, int]]:
        """Return the windows, each with the number of its last tokens that are scored.

        A window starts every ``stride`` tokens and scores the tokens that no earlier window has scored.
        """
        passes, last = [], 0
        for begin in range(0, len(self.tokens), self.step):
            end = min(begin + self.window, len(self.tokens))
            new = end - 1 - max(last, begin)
            if new > 0:
                passes.append((self.tokens[begin:end], new))
                last = end - 1
            if end == len(self.tokens):
                break
        return passes

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
    on_window: Callable[[], None] = lambda: None,
) -> TextScore:
    """Measure the perplexity on a text and the drift from a base model.

    Perplexity is ``exp`` of the mean negative log-likelihood per token, given all earlier tokens of the window
    (https://huggingface.co/docs/transformers/perplexity). If ``stride`` equals ``window``, the first token of every
    window is not scored, because no token precedes it.

    Drift is the Kullback-Leibler divergence ``KL(base || model)`` between the two distributions of the next token,
    averaged over the same positions, in nats per token.

    In a distributed run each process scores its share of the windows.

    Args:
        model: a causal language model of transformers, with or without adapters.
        text: the text to score.
        base_logits: given ``input_ids`` of shape ``(1, length)`` and a number ``k``, returns the base model's logits at
            the last ``k`` positions, shape ``(1, k, vocabulary)``. If ``None``, drift is not measured and reported as
            0.
        on_window: called after each window, for progress.

    Returns:
        Perplexity and drift. A perplexity too large for a float is infinite.
    """
    device = next(model.parameters()).device
    state = process_state()
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, divergence, tokens
    with evaluating(model), torch.no_grad():
        for number, (tokens, new) in enumerate(text.scored()):
            if number % state.num_processes == state.process_index:
                ids = tokens.to(device)[None]
                logits = model(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[0, :-1].float()
                sums[0] += nn.functional.cross_entropy(logits, ids[0, -new:], reduction="sum").item()
                if base_logits is not None:
                    sums[1] += _divergence(base_logits(ids, new + 1)[0, :-1].float(), logits)
                sums[2] += new
            on_window()
    if state.num_processes > 1:
        sums = reduce(sums.to(state.device), reduction="sum").cpu()
    loss, divergence, count = sums.tolist()
    try:
        return TextScore(perplexity=math.exp(loss / count), drift=_floor(divergence / count))
    except OverflowError:  # a model that diverged
        return TextScore(perplexity=math.inf, drift=divergence / count)


def _divergence(base: Tensor, logits: Tensor) -> float:
    """Sum ``KL(base || model)`` over positions, 256 at a time because the vocabulary is large."""
    total = 0.0
    for p, q in zip(base.split(256), logits.split(256), strict=True):
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        total += nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total


def _floor(drift: float) -> float:
    """Replace a negative drift, which is a rounding error, by 0; keep the NaN of a model that diverged."""
    return drift if math.isnan(drift) else max(0.0, drift)
