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
from curlora.errors import GuardError
from curlora.storage import write_whole
from curlora.text.decoding import named_ends, sample
from curlora.text.own_text import own_text
from curlora.text.rows import Rows

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

    def sample(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Rows:
        """Return the prompts with the model's answers, whose tokens count."""
        pairs = answer(model, tokenizer, self.prompts, self.max_new_tokens, self.seed)
        return Rows((torch.cat(pair) for pair in pairs), (_after(len(prompt), len(new)) for prompt, new in pairs))


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

    def sample(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Rows:
        """Return rows of which the tokens count that the model has sampled.

        Raises:
            RunError: if the model cannot write such text.
        """
        try:
            return own_text(
                model, tokenizer, tokens=self.tokens, max_length=self.max_length, seed=self.seed, progress=False
            )
        except GuardError as error:
            raise RunError(f"text {self.name!r}: {error}") from error


@dataclass(frozen=True)
class Answers(HeldOut):
    """Text that the base model has written. Only the tokens that it has sampled are scored.

    Args:
        counted: for each row, the mask of the sampled tokens, bool, shape ``(length,)``; ``tokens`` is the
            concatenation of the rows.
        model: the digest of the model that has written the text; empty if it is unknown.
    """

    counted: tuple[Tensor, ...] = field(default=(), repr=False)
    model: str = ""

    @classmethod
    def of(cls, name: str, rows: Rows, model: str = "") -> Answers:
        """Return the text with these rows."""
        return cls(name, torch.cat(list(rows)), counted=tuple(rows.counted), model=model)

    @property
    def longest(self) -> int:
        return max(map(len, self.counted))

    def as_rows(self) -> Rows:
        return Rows(self.tokens.split([len(mask) for mask in self.counted]), self.counted)

    def pieces(self, length: int = 128) -> Rows:
        return self.as_rows().cut(length)

    def describe(self) -> str:
        rows = self.as_rows()
        return f"{self.name} ({len(rows)} pieces written by the base model, {rows.tokens:,} tokens)"


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
        sampled = text.sample(model, tokenizer)
        kept = [
            {"tokens": row.tolist(), "counted": mask.int().tolist()}
            for row, mask in zip(sampled, sampled.counted, strict=True)
        ]
        write_whole(path, json.dumps({"digest": text.digest, "model": written_by, "rows": kept}))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        read = [_read_row(row) for row in content["rows"]]
        rows = Rows((row for row, _ in read), (mask for _, mask in read))
        complete = content["digest"] == text.digest and bool(rows)
        complete = complete and (isinstance(text, OwnText) or len(rows) == len(text.prompts))
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise RunError(
            f"{path} does not hold the text that the base model has written. Remove the file: the text is then sampled "
            "again."
        )
    return Answers.of(text.name, rows, content.get("model", ""))


def _read_row(row: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
    """Return the tokens of a stored row, and the mask of those that count."""
    if "prompt" in row:  # files of earlier versions: all tokens after the prompt count, also those of a chat template
        return torch.tensor(row["prompt"] + row["answer"]), _after(len(row["prompt"]), len(row["answer"]))
    return torch.tensor(row["tokens"]), torch.tensor(row["counted"], dtype=torch.bool)


def _after(prompt: int, new: int) -> Tensor:
    """Return a mask of the tokens after a prompt."""
    return torch.arange(prompt + new, device="cpu") >= prompt


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
