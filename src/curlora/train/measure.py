"""Measurements before and after training: the loss on held-out examples, and replies to prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from curlora.continual.generation import generate
from curlora.text.evaluating import evaluating
from curlora.text.perplexity import perplexity
from curlora.text.progress import Advance
from curlora.text.rows import IGNORED, Rows
from curlora.train.data import Prompt, Split

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
    on_tokens: Callable[[float], None] = lambda tokens: None,
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
    rows = Rows(
        (torch.tensor(row["input_ids"]) for row in held_out.rows),
        (torch.tensor(row["labels"]) != IGNORED for row in held_out.rows),
    )

    @contextmanager
    def told(_: str, batches: float | None) -> Iterator[Advance]:
        yield lambda done: on_tokens(held_out.tokens * done / (batches or 1))

    with evaluating(model), torch.no_grad(), autocast():
        found = perplexity(model, rows, max_length=max(2, *map(len, rows)), batch_size=batch_size, progress=told)
        replies = generate(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=reply_tokens, stop=stop)
    return Measured(math.log(found), [reply.text for reply in replies])
