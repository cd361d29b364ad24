"""Rows of tokens from the texts that a user gives: files, lists of texts, conversations or rows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from curlora.errors import GuardError

__all__ = ["IGNORED", "Rows", "Texts", "digest", "longest_row", "named_texts", "rows_of"]

IGNORED = -100
"""The label of a token that is not learned, as in transformers and in torch's cross-entropy."""

_SUFFIXES_OF_TEXTS = {".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz"}

Texts = str | Path | Sequence[Any] | Callable[[], float]
"""The path of a text file; a list of texts, conversations or rows of tokens; or a function that measures the model."""


def longest_row(config: Any) -> int | None:
    """Return the largest number of tokens in a row that a model has positions for; ``None`` if it states no limit.

    Args:
        config: the model's transformers configuration. A multimodal model has another one in it for its text.
    """
    positions = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


class Rows(list[Tensor]):
    """Rows of tokens with a mask of the tokens that count.

    The tokens that a chat template adds around a turn do not count. They are the same in every conversation, so a model
    that is trained on conversations learns to predict them in a few steps. If they counted, this gain would hide the
    loss on the other tokens.

    Args:
        rows: token ids, int64, each row of shape ``(length,)``.
        counted: for each row, the mask of the tokens that count as predicted tokens, bool, of the row's shape; all
            tokens if ``None``.
    """

    def __init__(self, rows: Iterable[Tensor], counted: Iterable[Tensor] | None = None) -> None:
        super().__init__(rows)
        self.counted = [torch.ones_like(row, dtype=torch.bool) for row in self] if counted is None else list(counted)

    @classmethod
    def joined(cls, several: Iterable[Rows]) -> Rows:
        """Concatenate the rows of several texts."""
        parts = list(several)
        return cls((row for part in parts for row in part), (mask for part in parts for mask in part.counted))

    def cut(self, length: int) -> Rows:
        """Split rows into rows of at most ``length`` tokens. Rows of one token are dropped: they predict nothing."""
        pieces = [
            both
            for row, mask in zip(self, self.counted, strict=True)
            for both in zip(row.split(length), mask.split(length), strict=True)
            if len(both[0]) > 1
        ]
        return Rows((row for row, _ in pieces), (mask for _, mask in pieces))

    @property
    def tokens(self) -> int:
        """The number of tokens that count. It includes a row's first token, although no token predicts it."""
        return sum(int(mask.sum()) for mask in self.counted)


def named_texts(texts: Mapping[str, Texts] | Texts) -> dict[str, Texts]:
    """Return texts by name. A single text without a name gets the name of its file, or "general text".

    Raises:
        GuardError: if there is no text, or one is empty, has another type, or is a string that is not a file's path.
    """
    if isinstance(texts, Mapping):
        named = dict(texts)
    else:
        named = {Path(texts).stem if isinstance(texts, (str, Path)) else "general text": texts}
    if not named:
        raise GuardError("texts is empty: give a text, or leave texts out to let the model write one itself.")
    for name, text in named.items():
        if text is None:  # the model writes it
            continue
        if not isinstance(text, (str, Path, Sequence)) and not callable(text):
            raise GuardError(
                f"texts[{name!r}] is {type(text).__name__}: a list of texts, a file's path or a function is expected."
            )
        if isinstance(text, str) and not text.strip():
            raise GuardError(f"texts[{name!r}] is empty: give at least one text, or the path of a text file.")
        if isinstance(text, (str, Path)) and _is(Path.is_dir, text):
            raise GuardError(f"texts[{name!r}] is a folder, {str(text)!r}: give the path of a text file.")
        if isinstance(text, (list, tuple)) and (path := _path_among(text)) is not None:
            raise GuardError(
                f"texts[{name!r}] is a list with the path of a file, {str(path)!r}. Items of a list are texts "
                "themselves: give a mapping from names to paths, or read the files."
            )
        if isinstance(text, (str, Path)) and not _is_file(text):
            raise GuardError(
                f"texts[{name!r}] is a string, {str(text)[:60]!r}, and there is no such file. Give the path of a text "
                "file, or a list of texts."
            )
        if not callable(text) and not len(str(text) if isinstance(text, Path) else text):
            raise GuardError(f"texts[{name!r}] is empty: give at least one text.")
    return named


def rows_of(name: str, text: Texts, tokenizer: Any, *, tokens: int, max_length: int) -> Rows:
    """Return the first ``tokens`` tokens of a text in rows of at most ``max_length``.

    Each paragraph of a file (separated by an empty line) is a text of its own. Conversations are lists of messages with
    ``role`` and ``content``; the tokenizer's chat template formats them. The content of all messages counts, except
    that of the system; the tokens that the template adds do not.

    Args:
        name: the text's name for error messages.
        text: the path of a file, or a list of texts, conversations or rows of tokens.
        tokenizer: the model's tokenizer.
        tokens: the largest number of tokens.
        max_length: the largest number of tokens in a row.

    Returns:
        Rows of at least two tokens each.

    Raises:
        GuardError: if the text cannot be read, or has no predicted token that counts.
    """
    items = _paragraphs(name, Path(text)) if isinstance(text, (str, Path)) else text
    assert isinstance(items, Sequence)
    masks = items.counted if isinstance(items, Rows) else None
    texts: list[tuple[Tensor, Tensor]] = []
    left = tokens
    for number, item in enumerate(items):
        ids, counted = (torch.tensor(found[:left], device="cpu") for found in _tokens(name, number, item, tokenizer))
        texts.append((ids, counted.bool() if masks is None else masks[number][:left]))
        left -= len(ids)
        if left <= 0:
            break
    rows = Rows((ids for ids, _ in texts), (counted for _, counted in texts)).cut(max_length)
    if not any(bool(counted[1:].any()) for counted in rows.counted):
        raise GuardError(
            f"texts[{name!r}] has no two tokens in a row that count, so there is nothing to predict. Is the text empty?"
        )
    return rows


def digest(rows: Iterable[Tensor]) -> str:
    """Return the SHA-256 of rows of tokens, as hexadecimal digits."""
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row).to_bytes(8, "little") + row.to(torch.int64).numpy().tobytes())
    return found.hexdigest()


def _is_file(path: Any) -> bool:
    return isinstance(path, (str, Path)) and _is(Path.is_file, path)


def _path_among(items: Sequence[Any]) -> str | Path | None:
    """Return an item of a list of texts that must be meant as the path of a file, whether or not this exists."""
    if items and all(map(_is_file, items)):
        found: str | Path = items[0]
        return found
    return next((item for item in items if _must_be_a_path(item)), None)


def _must_be_a_path(item: Any) -> bool:
    if not isinstance(item, str):
        return isinstance(item, Path)
    one_word = len(item) < 1000 and not any(map(str.isspace, item)) and "://" not in item
    return one_word and "/" in item and (_is_file(item) or Path(item).suffix.lower() in _SUFFIXES_OF_TEXTS)


def _is(kind: Callable[[Path], bool], path: str | Path) -> bool:
    try:
        return kind(Path(path))
    except OSError:  # the string is too long for a path
        return False


def _paragraphs(name: str, path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"texts[{name!r}]: {path} cannot be read as UTF-8 text: {error}") from error
    return [part for part in content.split("\n\n") if part.strip()] or [""]


def _tokens(name: str, number: int, item: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens of an item of a text, and the mask of those that count.

    Args:
        name: the text's name for error messages.
        number: the item's place in the text, from 0.
        item: a text, a conversation or a row of tokens.
        tokenizer: the model's tokenizer.
    """
    if isinstance(item, Tensor) and item.ndim == 1:
        return item.tolist(), [True] * len(item)
    if tokenizer is None:
        raise GuardError("Texts need the model's tokenizer: pass processing_class=... to the trainer.")
    if isinstance(item, str):
        ids = list(tokenizer(item)["input_ids"])
        return ids, [True] * len(ids)
    messages = item.get("messages", item) if isinstance(item, Mapping) else item
    if isinstance(messages, Sequence) and messages and all(isinstance(one, Mapping) for one in messages):
        if not getattr(tokenizer, "chat_template", None):
            raise GuardError(
                f"texts[{name!r}] has conversations, and the tokenizer has no chat template to format them: give "
                "texts, or set tokenizer.chat_template."
            )
        try:
            return _conversation(messages, tokenizer)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise GuardError(f"texts[{name!r}][{number}] does not fit the chat template: {error}") from error
    raise GuardError(
        f"texts[{name!r}][{number}] is {type(item).__name__}: a text, a conversation (a list of messages) or a row of "
        "tokens (a one-dimensional tensor) is expected."
    )


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and the mask of those that count.

    The content of all messages counts, except that of the system. All tokens count if the tokenizer gives no offsets,
    or if the template changes a message's content.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    known = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=known)
    ids = list(encoded["input_ids"])
    places = _places(text, messages, tokenizer) if known else None
    if places is None:
        return ids, [True] * len(ids)
    said = [place for place, message in zip(places, messages, strict=True) if message.get("role") != "system"]
    return ids, [any(max(a, begin) < min(b, end) for begin, end in said) for a, b in encoded["offset_mapping"]]


def _places(text: str, messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[tuple[int, int]] | None:
    """Return where the content of each message begins and ends in a formatted conversation.

    The template formats the messages once more with other contents, which occur nowhere else. A search for the contents
    themselves would find a short one in the words of the template.

    Args:
        text: the formatted conversation.
        messages: its messages.
        tokenizer: the model's tokenizer.

    Returns:
        The places; ``None`` if a content is not a string, or the template changes it by more than the spaces around it.
    """
    contents = [message.get("content") for message in messages]
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    try:
        rest = tokenizer.apply_chat_template(marked, tokenize=False)
    except Exception:  # a template may raise any exception
        return None
    between = []  # what the template puts before each content, and after the last
    for mark in marks:
        before, _, rest = rest.partition(mark)
        between.append(before)
    between.append(rest)
    places, end = [], len(between[0])
    for content, after in zip(contents, between[1:], strict=True):
        if not isinstance(content, str):
            return None
        kept = next((one for one in (content, content.strip()) if text.startswith(one + after, end)), None)
        if kept is None:
            return None
        places.append((end, end + len(kept)))
        end += len(kept) + len(after)
    return places if text.startswith(between[0]) and end == len(text) else None
