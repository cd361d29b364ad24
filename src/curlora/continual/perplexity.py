"""Perplexity of a causal language model on one long text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["perplexity", "window_count"]


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> float:
    """``exp`` of the mean negative log-likelihood per token, in nats.

    Windows of ``window`` tokens start every ``stride`` tokens, and each scores those of its tokens
    that no window before it has scored, given all before them in the window
    (https://huggingface.co/docs/transformers/perplexity). With ``stride = window`` the first token of
    every window is left out, having nothing before it.

    Args:
        model: a causal language model of transformers, adapted or not.
        tokens: the text, shape ``(length,)``, at least 2.
        window: tokens that a window holds; at least 2.
        stride: tokens from one window to the next; ``window`` if ``None``, which is the cheapest and
            scores the start of each window with little context.
        on_window: called after each window, for progress.

    Returns:
        The perplexity; infinite where it is too large for a float.

    Raises:
        ValueError: on fewer than two tokens, or a stride outside ``1..window``.
    """
    stride = window if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(tokens)}")
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"perplexity needs 1 <= stride <= window and window >= 2, got {stride=} and {window=}")
    training = model.training
    device = next(model.parameters()).device
    total, scored, last = 0.0, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for begin, end in _windows(len(tokens), window, stride):
                new = end - 1 - max(last, begin)
                if new > 0:
                    ids = tokens[begin:end].to(device)[None]
                    logits = model(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[0, :-1]
                    total += nn.functional.cross_entropy(logits.float(), ids[0, -new:], reduction="sum").item()
                    scored += new
                    last = end - 1
                on_window()
    finally:
        model.train(training)
    try:
        return math.exp(total / scored)
    except OverflowError:  # a model that diverged
        return math.inf


def window_count(length: int, window: int, stride: int | None = None) -> int:
    """How many windows :func:`perplexity` runs over a text of ``length`` tokens."""
    return len(_windows(length, window, window if stride is None else stride))


def _windows(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    spans = []
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        spans.append((begin, end))
        if end == length:
            break
    return spans
