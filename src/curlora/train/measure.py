"""What is measured before and after: the loss on held-out examples, and replies to prompts."""

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
    """A model at one moment.

    Args:
        loss: on held-out examples, in nats per token of their answers.
        replies: to each prompt.
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
    """Score held-out examples, and reply to prompts greedily. The model is in its own mode again afterwards.

    Args:
        model: a causal language model of transformers, with whatever adapters are in it.
        tokenizer: its tokenizer.
        held_out: what is scored; each of its trained tokens counts the same.
        prompts: to reply to.
        stop: tokens that end a reply, beside the model's own.
        reply_tokens: where a reply is cut off.
        batch_size: examples that are scored together.
        autocast: the precision that is computed in.
        on_tokens: told how many tokens have been gone through.
    """
    total = count = 0.0
    with evaluating(model), torch.no_grad(), autocast():
        for ids, mask, labels in _batches(held_out.rows, batch_size, tokenizer.pad_token_id):
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
            answers = labels[:, 1:].to(logits.device)
            for of_row, answer in zip(logits[:, :-1], answers, strict=True):  # one by one: the vocabulary is large
                trained = answer != IGNORED
                total += float(cross_entropy(of_row[trained].float(), answer[trained], reduction="sum").double())
                count += float(trained.sum())
            on_tokens(int(mask.sum()))
        replies = generate(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=reply_tokens, stop=stop)
    return Measured(total / count, [reply.text for reply in replies])


def _batches(rows: Sequence[Row], size: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, which of them count, and labels, each of shape ``(batch, length)``; rows of like length together."""
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
