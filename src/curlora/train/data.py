"""Read conversations from a file or the hub, split off held-out examples, and tokenize both parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from curlora.data.chat import ChatError, closing_token, lay_out, prompt_of
from curlora.data.conversations import Conversation, read_conversations, trained_turns
from curlora.data.errors import DataError, EncodingError, LayoutError
from curlora.data.read_table import TABLE_SUFFIXES, Place, Table, read_table
from curlora.hub import no_such_folder
from curlora.text.rows import IGNORED
from curlora.train.errors import TrainError
from curlora.train.model import Base
from curlora.train.options import TrainOptions

__all__ = ["Examples", "Prompt", "Split", "read_examples"]

Row = dict[str, list[int]]
"""A tokenized example: ``input_ids`` and ``labels``. A label equals the token where it is trained, and else is -100."""


@dataclass(frozen=True)
class Split:
    """Tokenized examples, and how many examples were too long.

    Args:
        rows: the tokenized examples.
        cut: number of rows that were truncated to ``max_length`` tokens.
        left_out: number of examples without a row, because their first answer begins after ``max_length`` tokens.
    """

    rows: list[Row]
    cut: int = 0
    left_out: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens in all rows that belong to answers and so count toward the loss."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    @property
    def longest(self) -> int:
        """Length of the longest row, in tokens."""
        return max(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Prompt:
    """A prompt whose reply is shown before and after training.

    Args:
        text: the text to show.
        ids: the tokens that the model is given.
        answer: the answer in the data; ``None`` if the user gave the prompt.
    """

    text: str
    ids: list[int]
    answer: str | None = None


@dataclass(frozen=True)
class Examples:
    """The data of one training.

    Args:
        train: the training examples.
        held_out: the examples that are only scored.
        held_out_from: a description of the source of the held-out examples.
        layout: a description of how examples become tokens.
        prompts: the prompts whose replies are shown.
        reply_tokens: maximum length of a reply, in tokens.
        stop: tokens that end a reply, in addition to the model's own.
        sha256: digest of all conversations, held-out ones included.
    """

    train: Split
    held_out: Split
    held_out_from: str
    layout: str
    prompts: list[Prompt]
    reply_tokens: int
    stop: frozenset[int]
    sha256: str


@dataclass(frozen=True)
class _Source:
    """Conversations, and the names that error messages use for them."""

    name: str
    conversations: list[Conversation]
    is_text: bool  # prompts and completions in plain text, which need no chat template
    where: Callable[[int], str]

    def only(self, numbers: Sequence[int]) -> _Source:
        chosen = [self.conversations[i] for i in numbers]
        return _Source(self.name, chosen, self.is_text, lambda place: self.where(numbers[place]))


def read_examples(options: TrainOptions, base: Base) -> Examples:
    """Read, check, split and tokenize the data. Only the tokenizer of the model is used.

    Raises:
        TrainError: if a row cannot be read, is not a conversation, has no answer, or cannot be laid out by the chat
            template, if all examples are too long, or if all held-out examples of a file are trained on. The message
            names the file and the row.
    """
    data = _read(options, options.data)
    sources = [data]
    if options.evaluation is not None:
        held_out = _read(options, options.evaluation)
        sources.append(held_out)
        train, held_out_from = data, held_out.name
    else:
        train, held_out = _split(data, options)
        held_out_from = f"split off {data.name} by seed {options.seed}"
    held_out_from += _trained_too(train, held_out, options)
    longest = min(options.max_length, base.positions or options.max_length)
    encoded = [_encode(part, base.tokenizer, longest, options) for part in (train, held_out)]
    has_template = bool(base.tokenizer.chat_template)
    prompts = [_own_prompt(text, base.tokenizer) for text in options.prompts]
    if not prompts:
        prompts = _prompts(held_out.only(range(min(options.REPLIES, len(held_out.conversations)))), base)
    reply_tokens = options.REPLY_TOKENS
    if base.positions is not None:  # the prompt and the reply must fit together
        reply_tokens = min(reply_tokens, base.positions // 2)
        prompts = [replace(prompt, ids=prompt.ids[reply_tokens - base.positions :]) for prompt in prompts]
    return Examples(
        train=encoded[0],
        held_out=encoded[1],
        held_out_from=held_out_from,
        layout="by the model's chat template" if has_template else "as plain text: the model has no chat template",
        prompts=prompts,
        reply_tokens=reply_tokens,
        stop=_stop(held_out, base) if has_template else frozenset(),
        sha256=_sha256([source.conversations for source in sources]),
    )


def _read(options: TrainOptions, name: str) -> _Source:
    try:
        place = _place(options, name)
        table = read_table(place, name)
        prompt, completion = options.columns or (None, None)
        conversations = read_conversations(table, name, table.number, prompt=prompt, completion=completion)
    except LayoutError as error:
        raise TrainError(
            f"{error.problem}. If two of them hold prompts and answers, name these with --columns PROMPT,ANSWER."
        ) from error
    except EncodingError as error:
        raise TrainError(f"{error.problem}. Convert the file to UTF-8.") from error
    except DataError as error:
        raise TrainError(f"{error.problem}.") from error
    return _Source(name, conversations, _is_text(table, options), lambda i: f"{name}: row {table.number(i)}")


def _place(options: TrainOptions, name: str) -> Place:
    path = Path(name).expanduser()
    if path.exists() or path.suffix.lower() in TABLE_SUFFIXES:
        return Place(path=path)
    if ("/" not in name and path.suffix) or no_such_folder(name):
        raise TrainError(f"{name}: there is no such file, and this is not a valid id of a data set on the hub.")
    return Place(hub=name, split=options.split, subset=options.subset)


def _is_text(table: Table, options: TrainOptions) -> bool:
    """Return whether the conversations were built from prompts and completions in plain text."""
    if options.columns is None and {"messages", "conversations"} & set(table.columns):
        return False
    first = next(iter(table))
    return not any(isinstance(first.get(column), list) for column in ("prompt", "completion", *(options.columns or ())))


def _split(data: _Source, options: TrainOptions) -> tuple[_Source, _Source]:
    count = len(data.conversations)
    wanted = max(options.HELD_OUT_LEAST, min(options.HELD_OUT_MOST, round(options.HELD_OUT_SHARE * count)))
    wanted = min(wanted, count // 2)
    if not wanted:
        raise TrainError(
            f"{data.name} has only one example, so none can be held out. Give more examples, or give held-out examples "
            "with --eval FILE."
        )
    order = numpy.random.default_rng(options.seed).permutation(count).tolist()
    return data.only(sorted(order[wanted:])), data.only(sorted(order[:wanted]))


def _trained_too(train: _Source, held_out: _Source, options: TrainOptions) -> str:
    """Say how many of the held-out examples are also trained on; nothing if none is.

    Raises:
        TrainError: if all of a file of held-out examples are.
    """
    trained = set(map(_sha256, train.conversations))
    both = sum(_sha256(conversation) in trained for conversation in held_out.conversations)
    if options.evaluation is not None and both == len(held_out.conversations):
        raise TrainError(
            f"--eval {options.evaluation}: all of its {both} examples are also in {train.name}, so the loss on them "
            "would say nothing about other examples. Give other examples, or leave --eval out to have some held out."
        )
    return f"; {both} of them are also among the training examples" if both else ""


def _encode(source: _Source, tokenizer: Any, max_length: int, options: TrainOptions) -> Split:
    if tokenizer.chat_template:
        laid_out = _by_template(source, tokenizer, options)
    elif source.is_text:
        laid_out = _as_text(source, tokenizer)
    else:
        raise TrainError(
            f"{source.name} holds messages, but the model's tokenizer has no chat template. Use the chat or instruct "
            "version of the model, or give prompts and completions as text."
        )
    rows, cut = [], 0
    for place, (ids, turns) in enumerate(laid_out):
        labels = [IGNORED] * len(ids)
        for begin, end in turns:
            labels[begin:end] = ids[begin:end]
        if all(label == IGNORED for label in labels[1:]):
            raise TrainError(f"{source.where(place)} has no token to train in its answers. Complete or remove the row.")
        kept = max((i + 1 for i, label in enumerate(labels[:max_length]) if i and label != IGNORED), default=0)
        if kept:  # the row ends with its last answer that fits
            rows.append({"input_ids": ids[:kept], "labels": labels[:kept]})
            cut += len(ids) > max_length
    if not rows:
        shortest = min(begin for _, turns in laid_out for begin, _ in turns[:1])
        raise TrainError(
            f"{source.name}: none of {len(laid_out)} examples is left, because every answer begins after the first "
            f"{max_length} tokens. Raise --max-length above {shortest}, or use a model with a longer context."
        )
    return Split(rows, cut, len(laid_out) - len(rows))


def _by_template(
    source: _Source, tokenizer: Any, options: TrainOptions
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    turns = [trained_turns(conversation, options.turns) for conversation in source.conversations]
    for place, (conversation, answers) in enumerate(zip(source.conversations, turns, strict=True)):
        if any(not conversation[turn]["content"].strip() for turn in answers):
            raise TrainError(f"{source.where(place)} has an empty answer. Complete or remove the row.")
        if source.is_text and not conversation[0]["content"].strip():
            raise TrainError(f"{source.where(place)} has an empty prompt. Complete or remove the row.")
    try:
        laid_out = lay_out(source.conversations, turns, tokenizer)
    except ChatError as error:
        raise TrainError(f"{source.where(error.number)}: {error.reason}.") from error
    return [(one.ids, one.turns) for one in laid_out]


def _as_text(source: _Source, tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenize each conversation as its prompt, its completion and the end-of-text token."""
    asked = tokenizer([turns[0]["content"] for turns in source.conversations], verbose=False)["input_ids"]
    answered = tokenizer(
        [turns[-1]["content"] for turns in source.conversations], add_special_tokens=False, verbose=False
    )["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    laid_out = []
    for place, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers append it to every text
            prompt = prompt[:-1]
        for what, ids in (("prompt", prompt), ("completion", answer)):
            if not ids:
                raise TrainError(f"{source.where(place)} has an empty {what}.")
        ids = [*prompt, *answer, *end]
        laid_out.append((ids, [(len(prompt), len(ids))]))
    return laid_out


def _prompts(held_out: _Source, base: Base) -> list[Prompt]:
    """Return a prompt for each conversation: all that precedes its last answer."""
    prompts = []
    for place, conversation in enumerate(held_out.conversations):
        (turn,) = trained_turns(conversation, "last")
        text = conversation[turn - 1]["content"]
        if base.tokenizer.chat_template:
            ids = prompt_of(place, conversation, turn, base.tokenizer)
        else:
            ids = base.tokenizer(text)["input_ids"]
        prompts.append(Prompt(text, ids, conversation[turn]["content"]))
    return prompts


def _own_prompt(text: str, tokenizer: Any) -> Prompt:
    if not text.strip():
        raise TrainError("--prompt is empty: give a text for the model to reply to.")
    if not tokenizer.chat_template:
        return Prompt(text, tokenizer(text)["input_ids"])
    conversation: Conversation = [{"role": "user", "content": text}]
    try:
        return Prompt(text, prompt_of(0, conversation, 1, tokenizer))
    except ChatError as error:
        raise TrainError(f"--prompt {text!r}: {error.reason}.") from error


def _stop(source: _Source, base: Base) -> frozenset[int]:
    turns = [trained_turns(conversation, "last") for conversation in source.conversations]
    ends = {closing_token(one, base.tokenizer) for one in lay_out(source.conversations, turns, base.tokenizer)}
    return frozenset(end for end in ends if end is not None)


def _sha256(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
