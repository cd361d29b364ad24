"""Perplexity of a text, and the divergence from a base model there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from curlora.errors import GuardError
from curlora.text.model_pass import NOTHING, batches_of, ready, run_batches
from curlora.text.processes import rank_and_count, sum_over_processes
from curlora.text.progress import Shown, stage
from curlora.tuner.weight import running_device

__all__ = ["perplexity", "score_text"]

_CHUNK = 128  # positions


def perplexity(
    model: nn.Module,
    data: Iterable[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    tokenizer: Any = None,
    *,
    max_length: int = 128,
    batch_size: int = 8,
    progress: Shown = False,
) -> float:
    """Return the perplexity: ``exp`` of the mean negative log-likelihood of the predicted tokens that count.

    Each token is predicted from the tokens before it in its row. The rows are those that :func:`curlora.calibrate`
    makes of the same text. The model is left unchanged. With ``torch.distributed``, texts and rows are divided among
    the processes, and every process gets the perplexity of all of them.

    Args:
        model: a causal language model.
        data, tokenizer, max_length, batch_size, progress: see :func:`curlora.calibrate`.

    Returns:
        The perplexity; infinity if it is too large for a float, and NaN if a prediction is NaN.

    Raises:
        GuardError: if the model is not a causal language model, if the text has no two consecutive tokens, or if a row
            is longer than the model's maximum length.
    """
    found, _ = score_text(model, data, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)
    return found


def score_text(
    model: nn.Module,
    data: Iterable[str] | Iterable[Tensor] | Iterable[Mapping[str, Tensor]],
    tokenizer: Any = None,
    *,
    base_logits: Callable[[Tensor, int], Tensor] | None = None,
    max_length: int = 128,
    batch_size: int = 8,
    progress: Shown = False,
) -> tuple[float, float]:
    """Measure the perplexity of a text, as :func:`perplexity` does, and the drift from a base model there.

    Drift is the Kullback-Leibler divergence ``KL(base || model)`` between the two distributions of the next token,
    averaged over the same tokens, in nats per token.

    Args:
        model: a causal language model.
        data, tokenizer, max_length, batch_size, progress: see :func:`curlora.calibrate`.
        base_logits: given ``input_ids`` of shape ``(batch, length)`` and a number ``k``, returns the base model's
            logits at the last ``k`` positions, shape ``(batch, k, vocabulary)``. Rows are padded on the right. ``None``
            if drift is not wanted.

    Returns:
        Perplexity and drift; drift is 0 if there is no base model. Both are NaN if a prediction is NaN.

    Raises:
        GuardError: see :func:`perplexity`.
    """
    rank, processes = rank_and_count()
    batches, count = batches_of(model, data, tokenizer, max_length, batch_size, rank, processes)
    device = running_device(model)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # negative log-likelihood, divergence, tokens
    with ready(model, {}, gradients=False), stage(progress, "measuring perplexity", count) as advance:
        for _, ids, _, answered, logits in run_batches(model, batches, device, from_first_answered=True):
            kept = logits.shape[1]
            targets = ids[:, ids.shape[1] - kept + 1 :]
            # A base model may return the logits of all positions.
            base = None if base_logits is None else base_logits(ids, kept)[:, -kept:]
            for row, wanted in enumerate(answered):  # row by row, because the logits are large
                of_row = logits[row, :-1][wanted].float()
                lost = cross_entropy(of_row, targets[row][wanted], reduction="sum")
                diverged = 0.0 if base is None else _divergence(base[row, :-1][wanted].float(), of_row)
                sums += torch.tensor([float(lost), diverged, len(of_row)], dtype=torch.float64, device="cpu")
            advance(1)
    (sums,) = sum_over_processes([sums], device)
    loss, divergence, tokens = sums.tolist()
    if not tokens:
        raise GuardError(NOTHING)
    try:
        found = math.exp(loss / tokens)
    except OverflowError:
        found = math.inf
    drift = divergence / tokens
    return found, drift if math.isnan(drift) else max(0.0, drift)  # below 0 by rounding


def _divergence(base: Tensor, logits: Tensor) -> float:
    """Sum ``KL(base || model)`` over positions, ``_CHUNK`` at a time because the vocabulary is large."""
    total = 0.0
    for p, q in zip(base.split(_CHUNK), logits.split(_CHUNK), strict=True):
        total += float(kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))
    return total
