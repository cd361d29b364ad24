"""Tokenize conversations with the tokenizer's chat template, and find the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from curlora.data.conversations import Conversation

__all__ = ["ChatError", "LaidOut", "closing_token", "lay_out", "prompt_of"]


class ChatError(ValueError):
    """The chat template rejects a conversation, or does not show which tokens are the assistant's.

    Args:
        number: the conversation's place in the list.
        reason: the reason, worded to follow "row 3: ".
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"conversation {number}: {reason}")
        self.number = number
        self.reason = reason


@dataclass(frozen=True)
class LaidOut:
    """The tokens of a conversation up to the end of its last trained turn.

    Args:
        ids: the tokens.
        turns: the start and end (exclusive) of each trained turn in ``ids``.
    """

    ids: list[int]
    turns: list[tuple[int, int]]


def lay_out(
    conversations: Sequence[Conversation], trained: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[LaidOut]:
    """Tokenize conversations and find the tokens of the turns that are trained.

    If the template marks generated text (``{% generation %}``), the marks give the turns. Otherwise each turn is found
    by rendering two prefixes: the messages before it with ``add_generation_prompt``, and the messages up to and
    including it. The turn is the text that the second has beyond the first. For this, each prefix must be rendered as
    the start of the whole conversation is. The turn ends with its last special token: the line break that templates
    put after it is not trained.

    Args:
        conversations: lists of messages with ``role`` and ``content``.
        trained: for each conversation the indices of the trained assistant messages, ascending, at least one.
        tokenizer: a tokenizer with a chat template.

    Raises:
        ChatError: if the template rejects a conversation (with the template's message), or renders the start of a
            conversation differently when more messages follow.
    """
    marked: list[LaidOut | None] = [None] * len(conversations)
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        marked = [
            _by_marks(number, messages, turns, tokenizer)
            for number, (messages, turns) in enumerate(zip(conversations, trained, strict=True))
        ]
    rest = [number for number, found in enumerate(marked) if found is None]
    compared = _by_prefixes(rest, [conversations[i] for i in rest], [trained[i] for i in rest], tokenizer)
    return [compared.pop(0) if found is None else found for found in marked]


def prompt_of(number: int, messages: Conversation, turn: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the prompt for message ``turn``: all messages before it and the start of an answer.

    Raises:
        ChatError: if the template rejects the conversation.
    """
    text = _render(number, messages[:turn], tokenizer, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _by_marks(
    number: int, messages: Conversation, trained: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> LaidOut | None:
    """Find the turns by the template's marks; ``None`` if the marks do not separate the assistant's messages."""
    messages = messages[: trained[-1] + 1]
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    try:
        found = tokenizer.apply_chat_template(_bare(messages), **options)
    except ValueError:  # a tokenizer without offsets of its tokens in the text
        return None
    except Exception as error:
        raise ChatError(number, _refusal(error)) from error
    mask = [0, *found["assistant_masks"], 0]
    begins = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    speaking = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(begins) != len(speaking):
        return None
    spans = dict(zip(speaking, zip(begins, ends, strict=True), strict=True))
    turns = [spans[i] for i in trained]
    return LaidOut(found["input_ids"][: turns[-1][1]], turns)


def _by_prefixes(
    numbers: Sequence[int],
    conversations: Sequence[Conversation],
    trained: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[LaidOut]:
    if not conversations:
        return []
    texts: list[str] = []  # for each turn of each conversation the text before it and the text up to its end
    for number, messages, turns in zip(numbers, conversations, trained, strict=True):
        parts = []
        for turn in turns:
            parts.append(_render(number, messages[:turn], tokenizer, add_generation_prompt=True))
            parts.append(_render(number, messages[: turn + 1], tokenizer))
        for shorter, longer in pairwise(parts):
            if not longer.startswith(shorter):
                raise ChatError(
                    number,
                    "the chat template renders the start of a conversation differently when more messages follow, so "
                    "an answer cannot be separated from its prompt. " + _way_out(len(turns) > 1),
                )
        texts += parts
    tokens: Iterator[list[int]] = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    special = _special(tokenizer)
    found = []
    for turns in trained:
        encoded = [next(tokens) for _ in range(2 * len(turns))]
        ids = encoded[-1]
        # A token may span the end of the prompt. It then holds the start of the answer and belongs to the answer.
        bounds = [_common(part, ids) for part in encoded]
        spans = [
            (begin, _end_of_turn(ids, begin, end, tokenizer, special))
            for begin, end in zip(bounds[::2], bounds[1::2], strict=True)
        ]
        found.append(LaidOut(ids[: spans[-1][1]], spans))
    return found


def _way_out(several: bool) -> str:
    marks = "a template that marks generated text ({% generation %})"
    return f"Set turns: last, or use {marks}" if several else f"Use {marks}"


def _render(number: int, messages: Conversation, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(_bare(messages), tokenize=False, **options)
    except Exception as error:  # a template is a program and may raise anything
        raise ChatError(number, _refusal(error)) from error
    return text


def _refusal(error: Exception) -> str:
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return f"the chat template rejects the conversation: {kind}{error}"


def _bare(messages: Conversation) -> list[dict[str, Any]]:
    """Return the messages without ``weight``, which is not for the template."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _end_of_turn(
    ids: Sequence[int], begin: int, end: int, tokenizer: PreTrainedTokenizerBase, special: set[int]
) -> int:
    last = [position for position in range(begin, end) if ids[position] == tokenizer.eos_token_id]
    if last:
        return last[-1] + 1
    last = [position for position in range(begin, end) if ids[position] in special]
    if last and not tokenizer.decode(ids[last[-1] + 1 : end]).strip():
        return last[-1] + 1
    return end


def closing_token(laid_out: LaidOut, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that ends the last trained turn, or ``None`` if none does."""
    special = _special(tokenizer)
    begin, end = laid_out.turns[-1]
    end = _end_of_turn(laid_out.ids, begin, end, tokenizer, special)
    last = laid_out.ids[end - 1] if end > begin else None
    return last if last in special else None
