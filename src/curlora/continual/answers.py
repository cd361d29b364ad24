"""Text that the base model writes: sampled once, saved, and used as a held-out text or as the guard's text.

The model either answers a list of prompts or writes freely. If a task has the same form as the prompts, a fine-tuned
model drifts more on these answers than on any other text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from curlora.continual.errors import RunError
from curlora.continual.heldout import HeldOut
from curlora.continual.model_digest import model_digest
from curlora.guard.decoding import named_ends, sample
from curlora.guard.errors import GuardError
from curlora.guard.own_text import own_text
from curlora.guard.texts import Rows
from curlora.storage import write_whole

__all__ = ["ANSWERS", "Answers", "OwnText", "PromptList", "answer", "encoded_prompt", "kept_answers"]

ANSWERS = "answers-"
"""How the names of the files in a run directory begin that hold what the base model has written."""

_TOGETHER = 8  # prompts in a batch


@dataclass(frozen=True)
class PromptList:
    """Prompts that the base model answers.

    Args:
        name: the text's name in reports; unique in a run.
        prompts: the prompts as text. If the tokenizer has a chat template, each becomes a user message.
        max_new_tokens: the most tokens of an answer.
        seed: seed of the sampling.
        longest_prompt: the number of tokens of the longest prompt, if it is known.
    """

    name: str
    prompts: tuple[str, ...]
    max_new_tokens: int = 128
    seed: int = 0
    longest_prompt: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the answers except the model."""
        content = [self.name, self.prompts, self.max_new_tokens, self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """The number of rows that will be sampled."""
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt with a full answer."""
        return self.longest_prompt + self.max_new_tokens

    def sample(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of the tokens of a prompt and the tokens of the model's answer."""
        return answer(model, tokenizer, self.prompts, self.max_new_tokens, self.seed)


@dataclass(frozen=True)
class OwnText:
    """Text that the base model writes without a prompt, see :func:`curlora.guard.own_text`.

    Args:
        name: the text's name in reports; unique in a run.
        tokens: the least number of tokens.
        max_length: tokens of a row.
        seed: seed of the sampling.
    """

    name: str
    tokens: int = 8192
    max_length: int = 128
    seed: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the text except the model."""
        content = ["own text", self.name, self.tokens, self.max_length, self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """About the number of rows that will be sampled."""
        return -(-self.tokens // self.max_length)

    def sample(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of the tokens that a row begins with and the tokens that the model has sampled after them.

        Raises:
            RunError: if the model cannot write such text.
        """
        try:
            found = own_text(
                model, tokenizer, tokens=self.tokens, max_length=self.max_length, seed=self.seed, progress=False
            )
        except GuardError as error:
            raise RunError(f"text {self.name!r}: {error}") from error
        begins = [int(drawn.int().argmax()) for drawn in found.counted]
        return [(row[:begin], row[begin:]) for row, begin in zip(found, begins, strict=True)]


@dataclass(frozen=True)
class Answers(HeldOut):
    """Text that the base model has written. Only the tokens after each row's prompt, or start, are scored.

    Args:
        prompt_lengths: the number of prompt tokens of each row.
        model: the digest of the model that has written the text; empty if it is unknown.
        lengths: the number of tokens of each row; ``tokens`` is the concatenation of the rows.
    """

    lengths: tuple[int, ...] = field(default=(), repr=False)
    prompt_lengths: tuple[int, ...] = field(default=(), repr=False)
    model: str = ""

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The rows: each prompt with its answer, shape ``(length,)``."""
        return self.tokens.split(list(self.lengths))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def scored(self) -> list[tuple[Tensor, int]]:
        return [(row, len(row) - prompt) for row, prompt in zip(self.rows, self.prompt_lengths, strict=True)]

    def pieces(self, length: int = 128) -> Rows:
        written = (
            torch.arange(n, device="cpu") >= prompt for n, prompt in zip(self.lengths, self.prompt_lengths, strict=True)
        )
        return Rows(self.rows, written).cut(length)

    def describe(self) -> str:
        count = sum(new for _, new in self.scored())
        return f"{self.name} ({len(self.lengths)} pieces written by the base model, {count:,} tokens)"


def kept_answers(
    text: PromptList | OwnText,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    load_model: Callable[[], Any],
    digest_of: Callable[[nn.Module], str] = model_digest,
) -> Answers:
    """Read the base model's text from ``directory``; sample and save it first if it is not there.

    Args:
        text: what the model is to write.
        tokenizer: the model's tokenizer.
        directory: an existing folder.
        load_model: returns the base model on the device that it is to run on; called only if the text is missing.
        digest_of: returns the model's digest as it was loaded; a forward pass may repack quantized weights.

    Raises:
        RunError: if the file does not hold this text.
    """
    path = directory / f"{ANSWERS}{text.digest[:16]}.json"
    if not path.exists():
        model = load_model()
        written_by = digest_of(model)
        rows = text.sample(model, tokenizer)
        kept = [{"prompt": prompt.tolist(), "answer": tokens.tolist()} for prompt, tokens in rows]
        write_whole(path, json.dumps({"digest": text.digest, "model": written_by, "rows": kept}))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(row["prompt"], row["answer"]) for row in content["rows"]]
        complete = content["digest"] == text.digest and bool(pairs)
        complete = complete and (isinstance(text, OwnText) or len(pairs) == len(text.prompts))
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise RunError(
            f"{path} does not hold the text that the base model has written. Remove the file: the text is then sampled "
            "again."
        )
    return Answers(
        text.name,
        torch.tensor([token for prompt, tokens in pairs for token in prompt + tokens]),
        lengths=tuple(len(prompt) + len(tokens) for prompt, tokens in pairs),
        prompt_lengths=tuple(len(prompt) for prompt, _ in pairs),
        model=content.get("model", ""),
    )


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Sample a model's answers at temperature 1.

    Args:
        model: a causal language model that can generate.
        tokenizer: its tokenizer; its chat template is used if it has one.
        prompts: the prompts as text.
        max_new_tokens: the most tokens of an answer, the end-of-text token included.
        seed: seed of the sampling.

    Returns:
        Pairs of the tokens of a prompt, as the model reads it, and the tokens of its answer, at least one.
    """
    encoded = [encoded_prompt(tokenizer, prompt) for prompt in prompts]
    ends, pad = named_ends(model), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    answers = []
    for begin in range(0, len(encoded), _TOGETHER):
        batch = encoded[begin : begin + _TOGETHER]
        numbers = range(begin, begin + len(batch))
        found = sample(model, batch, numbers=numbers, ends=ends, pad=pad, max_new_tokens=max_new_tokens, seed=seed)
        answers += [(torch.tensor(row), torch.tensor(new)) for row, new in zip(batch, found, strict=True)]
    return answers


def encoded_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a prompt as the model reads it.

    Raises:
        RunError: if there are none.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise RunError(f"The prompt {prompt!r} gives no tokens. Remove it.")
    return list(ids)
