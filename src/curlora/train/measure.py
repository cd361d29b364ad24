"""Measurements before and after training: the loss on held-out examples, and replies to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from curlora.continual.generation import generate
from curlora.guard.evaluating import evaluating
from curlora.train.data import IGNORED, Prompt, Row, Split

__all__ = ["Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """The measurements of a model at one time.

    Args:
        loss: the mean loss on held-out examples, in nats per token of their answers.
        replies: one reply for each prompt.
    """

    loss: float
    replies: list[str]


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Split,
    prompts: Sequence[Prompt],
    *,
    stop: frozenset[int],
    reply_tokens: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Measured:
    """Compute the loss on held-out examples, and generate greedy replies to prompts.

    The model runs in evaluation mode. Its own mode is restored afterwards.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer: the model's tokenizer.
        held_out: the examples to score. The loss is the mean over all their answer tokens.
        prompts: the prompts to reply to.
        stop: tokens that end a reply, in addition to the model's own.
        reply_tokens: maximum length of a reply, in tokens.
        batch_size: number of examples that are scored together.
        autocast: returns the context manager that sets the precision.
        on_tokens: called after each batch with the number of tokens that were scored.
    """
    total = count = 0.0
    with evaluating(model), torch.no_grad(), autocast():
        for ids, mask, labels in _batches(held_out.rows, batch_size, tokenizer.pad_token_id):
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
            answers = labels[:, 1:].to(logits.device)
            for of_row, answer in zip(logits[:, :-1], answers, strict=True):  # row by row, to save memory
                trained = answer != IGNORED
                total += float(cross_entropy(of_row[trained].float(), answer[trained], reduction="sum").double())
                count += float(trained.sum())
            on_tokens(int(mask.sum()))
        replies = generate(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=reply_tokens, stop=stop)
    return Measured(total / count, [reply.text for reply in replies])


def _batches(rows: Sequence[Row], size: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield tokens, attention mask and labels, each of shape ``(batch, length)``, with rows sorted by length."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for begin in range(0, len(ordered), size):
        chosen = ordered[begin : begin + size]
        length = len(chosen[0]["input_ids"])
        filled = {
            name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in chosen])
            for name, value in (("input_ids", pad), ("labels", IGNORED))
        }
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in chosen])
        yield filled["input_ids"], mask, filled["labels"]
