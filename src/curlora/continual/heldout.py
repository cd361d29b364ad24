"""What a language model has lost, measured on a text that it is not trained on: perplexity, and drift from the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from curlora.continual.processes import process_state
from curlora.continual.results import TextScore

__all__ = ["HeldOut", "measure", "perplexity"]


@dataclass(frozen=True)
class HeldOut:
    """A text whose perplexity is followed.

    Args:
        name: for people; unique in a run.
        tokens: the text, shape ``(length,)``.
        window: tokens that are scored together.
        stride: tokens from one window to the next; ``window`` if ``None``.
        shown: whether methods are shown it, as plug-ins are the guard's text.

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
        """Tokens from one window to the next."""
        return self.window if self.stride is None else self.stride

    @property
    def windows(self) -> int:
        """How many forward passes scoring it takes."""
        return len(self.scored())

    @property
    def longest(self) -> int:
        """Tokens of the longest forward pass."""
        return min(self.window, len(self.tokens))

    def scored(self) -> list[tuple[Tensor, int]]:
        """What is passed to the model, each with the number of its last tokens that are scored.

        Windows start every ``stride`` tokens, and each scores those of its tokens that no window before it has scored.
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
        """The text in rows of that many tokens, or of a window's if that is shorter, as calibration takes it."""
        return self.tokens.split(min(length, self.window))

    def describe(self) -> str:
        """What is scored, in words."""
        how = "one chunk" if self.windows == 1 else f"windows of {self.window:,}, stride {self.step:,}"
        return f"{self.name} ({len(self.tokens):,} tokens, {how})"


@contextlib.contextmanager
def _evaluating(*models: nn.Module):  # type: ignore[no-untyped-def]
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def measure(
    model: nn.Module,
    text: HeldOut,
    base_logits: Callable[[Tensor, int], Tensor] | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> TextScore:
    """Perplexity on a text, and the drift from a base model on it.

    Perplexity is ``exp`` of the mean negative log-likelihood per token, given all tokens before it in its window
    (https://huggingface.co/docs/transformers/perplexity). With a stride of a whole window the first
    token of every window is left out, having nothing before it.

    Drift is the mean over the same positions of the Kullback-Leibler divergence ``KL(base || model)`` between the two
    predictions of the next token, in nats per token.

    In a distributed run every process scores its share of the windows.

    Args:
        model: a causal language model of transformers, adapted or not.
        text: what to score.
        base_logits: given ``input_ids`` of shape ``(1, length)`` and a number, the base model's logits at that many
            last positions; without it there is no drift to be measured and it is reported as 0.
        on_window: called after each window, for progress.

    Returns:
        Both figures; a perplexity too large for a float is infinite.
    """
    device = next(model.parameters()).device
    state = process_state()
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, divergence, tokens
    with _evaluating(model):
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


def perplexity(model: nn.Module, tokens: Tensor, *, window: int = 512, stride: int | None = None) -> float:
    """The perplexity alone; see :func:`measure`."""
    return measure(model, HeldOut("text", tokens, window, stride)).perplexity


def _divergence(base: Tensor, logits: Tensor) -> float:
    """Sum over positions of ``KL(base || model)``, a few hundred positions at a time: the vocabulary is large."""
    total = 0.0
    for p, q in zip(base.split(256), logits.split(256), strict=True):
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        total += nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total


def _floor(drift: float) -> float:
    """Not below zero, where rounding may take it; a model that diverged has none."""
    return drift if math.isnan(drift) else max(0.0, drift)
