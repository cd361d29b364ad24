"""What the base model answers to a list of prompts: sampled once, kept, and followed like any held-out text.

Of all texts it is the one that a fine-tuned model drifts most on, where the task shares its form with the prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from curlora.continual.errors import RunError
from curlora.continual.heldout import HeldOut
from curlora.continual.storage import write_whole
from curlora.guard.decoding import named_ends, sample

__all__ = ["Answers", "PromptList", "answer", "kept_answers"]

_TOGETHER = 8  # prompts that are answered in one batch


@dataclass(frozen=True)
class PromptList:
    """Prompts that the base model has to answer.

    Args:
        name: for people; unique in a run.
        prompts: in words; a chat's user asks them where the tokenizer has a chat template.
        max_new_tokens: of an answer.
        seed: of the sampling.
    """

    name: str
    prompts: tuple[str, ...]
    max_new_tokens: int = 128
    seed: int = 0

    @property
    def digest(self) -> str:
        """Of all that decides the answers, the model aside."""
        content = [self.name, self.prompts, self.max_new_tokens, self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Answers(HeldOut):
    """Answers of the base model, each scored after its prompt.

    Args:
        prompt_lengths: how many tokens of each row are its prompt.
        lengths: of the rows, of which ``tokens`` is the concatenation.
    """

    lengths: tuple[int, ...] = field(default=(), repr=False)
    prompt_lengths: tuple[int, ...] = field(default=(), repr=False)

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Each prompt with its answer."""
        return self.tokens.split(list(self.lengths))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def scored(self) -> list[tuple[Tensor, int]]:
        return [(row, len(row) - prompt) for row, prompt in zip(self.rows, self.prompt_lengths, strict=True)]

    def pieces(self, length: int = 128) -> tuple[Tensor, ...]:
        return tuple(piece for row in self.rows for piece in row.split(length) if len(piece) > 1)

    def describe(self) -> str:
        count = sum(new for _, new in self.scored())
        return f"{self.name} ({len(self.lengths)} answers of the base model, {count:,} tokens)"


def kept_answers(text: PromptList, tokenizer: PreTrainedTokenizerBase, directory: Path, load_model: Any) -> Answers:
    """The answers that ``directory`` holds, or new ones, which it holds from then on.

    Args:
        text: the prompts.
        tokenizer: of the model.
        directory: a folder that is there.
        load_model: gives the base model, on the device that it is to run on; called only where answers are missing.

    Raises:
        RunError: if the file does not hold answers to these prompts.
    """
    path = directory / f"answers-{text.digest[:16]}.json"
    if not path.exists():
        rows = answer(load_model(), tokenizer, text.prompts, text.max_new_tokens, text.seed)
        kept = [{"prompt": prompt.tolist(), "answer": tokens.tolist()} for prompt, tokens in rows]
        write_whole(path, json.dumps({"digest": text.digest, "rows": kept}))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(row["prompt"], row["answer"]) for row in content["rows"]]
        complete = content["digest"] == text.digest and len(pairs) == len(text.prompts)
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise RunError(f"{path} does not hold the base model's answers. Remove it, and they are sampled again.")
    return Answers(
        text.name,
        torch.tensor([token for prompt, tokens in pairs for token in prompt + tokens]),
        lengths=tuple(len(prompt) + len(tokens) for prompt, tokens in pairs),
        prompt_lengths=tuple(len(prompt) for prompt, _ in pairs),
    )


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Sample a model's answers from its own distribution, at temperature 1.

    Args:
        model: a causal language model that can generate.
        tokenizer: its tokenizer; its chat template is used where it has one.
        prompts: what is answered.
        max_new_tokens: of an answer, its end included.
        seed: of the sampling.

    Returns:
        Tokens of each prompt, as the model has read it, and of its answer: at least one.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    ends, pad = named_ends(model), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    answers = []
    for begin in range(0, len(encoded), _TOGETHER):
        batch = encoded[begin : begin + _TOGETHER]
        numbers = range(begin, begin + len(batch))
        found = sample(model, batch, numbers=numbers, ends=ends, pad=pad, max_new_tokens=max_new_tokens, seed=seed)
        answers += [(torch.tensor(row), torch.tensor(new)) for row, new in zip(batch, found, strict=True)]
    return answers


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise RunError(f"The prompt {prompt!r} becomes no tokens: leave it out.")
    return list(ids)
