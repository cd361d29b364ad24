"""The tasks of a stream: what is learned from and what is scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jinja2
from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "ChatTask", "ClassificationTask", "CompletionTask", "Row", "Task", "TaskError"]

Row = dict[str, Any]
"""An encoded example: ``input_ids``, and ``labels``: a class, or for every token what comes next (-100: not scored)."""

IGNORED = -100
"""A label that is not one; the value that torch's losses pass over."""


class TaskError(ValueError):
    """A task, or an example of it, is not right; says which and what."""


@dataclass(frozen=True)
class Task:
    """What all kinds of tasks share.

    Args:
        name: short name, of letters, digits, ``-`` and ``_``; unique in a stream.
        train: examples to learn from.
        evaluation: examples to be scored on.
        description: one sentence for people.
        training: settings that are different for this task.

    Raises:
        TaskError: on a name that cannot be a file name, or an empty split.
    """

    kind: ClassVar[str]
    metric: ClassVar[str]

    name: str
    train: Sequence[Any]
    evaluation: Sequence[Any]
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise TaskError(f"task name {self.name!r} may only hold letters, digits, '-' and '_'")
        for split in ("train", "evaluation"):
            if not getattr(self, split):
                raise TaskError(f"task {self.name!r}: the {split} split is empty")

    @property
    def classes(self) -> int | None:
        """Classes of the task's own head; ``None`` if the language model itself answers."""
        return None

    @property
    def majority_rate(self) -> float:
        """Score on the evaluation split of always giving its most frequent answer."""
        counts = Counter(self._answer(example) for example in self.evaluation)
        return max(counts.values()) / len(self.evaluation)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        """The rows of a split, in its order.

        Raises:
            TaskError: if an example becomes nothing that can be learned or scored.
        """
        examples = getattr(self, split)
        rows = self._rows(examples, tokenizer, max_length)
        for number, row in enumerate(rows):
            if not row["input_ids"]:
                raise TaskError(f"task {self.name!r}: {split} row {number} has no token: {examples[number]!r}")
        return rows

    def _answer(self, example: Any) -> Hashable:
        raise NotImplementedError

    def _rows(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        raise NotImplementedError


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Texts with a class each, told by a head of the task's own; scored by accuracy.

    Args:
        train, evaluation: ``(text, class)`` pairs.
        labels: the names of the classes.

    Raises:
        TaskError: also on fewer than two classes, or a class out of range.
    """

    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"

    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise TaskError(f"task {self.name!r} needs at least two labels, got {list(self.labels)}")
        for split in ("train", "evaluation"):
            for row, (_, label) in enumerate(getattr(self, split)):
                if not 0 <= label < len(self.labels):
                    raise TaskError(
                        f"task {self.name!r}: {split} row {row} has label {label}, outside 0..{len(self.labels) - 1}"
                    )

    @property
    def classes(self) -> int:
        return len(self.labels)

    def _answer(self, example: tuple[str, int]) -> Hashable:
        return example[1]

    def _rows(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        ids = tokenizer([text for text, _ in examples], truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, examples, strict=True)]


@dataclass(frozen=True)
class CompletionTask(Task):
    """Prompts with a completion each, given by the language model itself; the loss is on the completion alone.

    The end of the text is part of the completion. Scored by exact match: the share of examples whose every token of
    the completion is the most likely one, which is whether greedy decoding gives the completion token for token. Where
    an example is longer than ``max_length``, the start of its prompt is cut off.

    Args:
        train, evaluation: ``(prompt, completion)`` pairs.
    """

    kind: ClassVar[str] = "completion"
    metric: ClassVar[str] = "exact match"

    def _answer(self, example: tuple[str, str]) -> Hashable:
        return example[1]

    def _rows(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        prompts = [_open_ended(ids, tokenizer) for ids in tokenizer([prompt for prompt, _ in examples])["input_ids"]]
        completions = tokenizer([text for _, text in examples], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pairs = zip(prompts, completions, strict=True)
        return [self._row(prompt, [*completion, *end], max_length, tokenizer) for prompt, completion in pairs]

    def _row(
        self, prompt: list[int], completion: list[int], max_length: int, tokenizer: PreTrainedTokenizerBase
    ) -> Row:
        if not prompt or not completion:
            raise TaskError(
                f"task {self.name!r}: an example has no token in its {'completion' if prompt else 'prompt'}"
            )
        if len(completion) >= max_length:
            raise TaskError(
                f"task {self.name!r}: a completion of {len(completion)} tokens leaves no room for its prompt in "
                f"max_length {max_length}; raise max_length"
            )
        # The last token is nobody's context, and so not an input.
        first = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
        room = max_length + 1 - len(completion) - len(first)
        ids = [*first, *prompt[len(first) :][-room:], *completion] if room else [*first, *completion]
        targets = [IGNORED] * (len(ids) - len(completion)) + completion
        return {"input_ids": ids[:-1], "labels": targets[1:]}


@dataclass(frozen=True)
class ChatTask(CompletionTask):
    """Conversations, of which the last message is the completion and all before it the prompt.

    Laid out by the tokenizer's own chat template.

    Args:
        train, evaluation: lists of ``{"role": ..., "content": ...}`` messages, the last one the assistant's.

    Raises:
        TaskError: also on a conversation that does not end with the assistant.
    """

    kind: ClassVar[str] = "chat"

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in ("train", "evaluation"):
            for row, messages in enumerate(getattr(self, split)):
                if any(not isinstance(message.get("content"), str) for message in messages):
                    raise TaskError(f"task {self.name!r}: {split} row {row} has a message whose content is not text")
                if len(messages) < 2 or messages[-1]["role"] != "assistant":
                    raise TaskError(
                        f"task {self.name!r}: {split} row {row} must be a conversation that ends with the assistant's "
                        f"answer, got the roles {[message.get('role') for message in messages]}"
                    )

    def _answer(self, example: Any) -> Hashable:
        return example[-1]["content"]

    def _rows(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        if not tokenizer.chat_template:
            raise TaskError(f"task {self.name!r}: the model's tokenizer has no chat template")
        rows = []
        for messages in examples:
            try:
                prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
                whole = tokenizer.apply_chat_template(messages, return_dict=True)
            except jinja2.TemplateError as error:
                raise TaskError(f"task {self.name!r}: the chat template refuses {messages!r}: {error}") from error
            before, ids = prompt["input_ids"], whole["input_ids"]
            if ids[: len(before)] != before:
                raise TaskError(
                    f"task {self.name!r}: the chat template lays out the start of a conversation differently once the "
                    "answer follows, so the answer cannot be told from the prompt"
                )
            rows.append(self._row(before, _to_the_end(ids[len(before) :], tokenizer), max_length, tokenizer))
        return rows


def _open_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the end of text that some tokenizers add: a completion follows."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if ids and ids[-1] in ends else ids


def _to_the_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to the end of the answer: templates put a line break behind it, which nobody would wait for."""
    ends = [position for position, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[: ends[-1] + 1] if ends else ids
