"""Texts that a user names, as rows of tokens: files, lists of texts, conversations, rows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curlora.guard.errors import GuardError

__all__ = ["Rows", "Texts", "digest", "named_texts", "rows_of"]

Texts = str | Path | Sequence[Any] | Callable[[], float]
"""A file's path, a list of texts, of conversations or of rows of tokens, or a measurement of the user's own."""


class Rows(list[Tensor]):
    """Rows of tokens, and which of them count.

    What a chat template puts around a turn does not: it is the same in every conversation, so a model that is trained
    on conversations foretells it after a few steps. Were it counted, the gain on it would hide what is lost on the
    rest.

    Args:
        rows: int64, each of shape ``(length,)``.
        counted: of each row which of its tokens are foretold and count, bool, of the row's shape; all if ``None``.
    """

    def __init__(self, rows: Iterable[Tensor], counted: Iterable[Tensor] | None = None) -> None:
        super().__init__(rows)
        self.counted = [torch.ones_like(row, dtype=torch.bool) for row in self] if counted is None else list(counted)

    @classmethod
    def joined(cls, several: Iterable[Rows]) -> Rows:
        """Those of several texts, one after the other."""
        parts = list(several)
        return cls((row for part in parts for row in part), (mask for part in parts for mask in part.counted))

    def cut(self, length: int) -> Rows:
        """In rows of at most so many tokens; a token by itself, which foretells nothing, is left out."""
        pieces = [
            both
            for row, mask in zip(self, self.counted, strict=True)
            for both in zip(row.split(length), mask.split(length), strict=True)
            if len(both[0]) > 1
        ]
        return Rows((row for row, _ in pieces), (mask for _, mask in pieces))

    @property
    def tokens(self) -> int:
        """How many count; the first of a row, which nothing comes before, among them."""
        return sum(int(mask.sum()) for mask in self.counted)


def named_texts(texts: Mapping[str, Texts] | Texts) -> dict[str, Texts]:
    """Texts by name; of one that has none, a file is called by its own name.

    Raises:
        GuardError: if there is none, or one is not a text that can be read.
    """
    if isinstance(texts, Mapping):
        named = dict(texts)
    else:
        named = {Path(texts).name if isinstance(texts, (str, Path)) else "general text": texts}
    if not named:
        raise GuardError("texts is empty: name a text, or leave texts out, and the model writes one itself.")
    for name, text in named.items():
        if not isinstance(text, (str, Path, Sequence)) and not callable(text):
            raise GuardError(
                f"texts[{name!r}] is {type(text).__name__}: a list of texts, a file's path or a function is expected."
            )
        if isinstance(text, (str, Path)) and not _is_file(text):
            raise GuardError(
                f"texts[{name!r}] is a string, {str(text)[:60]!r}, and there is no such file. Give the path of a text "
                "file, or a list of texts."
            )
        if not callable(text) and not len(str(text) if isinstance(text, Path) else text):
            raise GuardError(f"texts[{name!r}] is empty: there is nothing to go by.")
    return named


def rows_of(name: str, text: Texts, tokenizer: Any, *, tokens: int, max_length: int) -> Rows:
    """The first ``tokens`` tokens of a text, in rows of at most ``max_length``.

    A file is read as one text, whose paragraphs (parted by an empty line) are texts of their own. Conversations, lists
    of messages with ``role`` and ``content``, are laid out by the tokenizer's chat template; what users and assistants
    say in them counts.

    Args:
        name: for errors.
        text: what it is made of; no function.
        tokenizer: of the model.
        tokens: at most so many.
        max_length: of a row.

    Returns:
        Each of two tokens or more.

    Raises:
        GuardError: if nothing of it can be used, with why.
    """
    items = _paragraphs(name, Path(text)) if isinstance(text, (str, Path)) else text
    assert isinstance(items, Sequence)
    texts: list[tuple[Tensor, Tensor]] = []
    left = tokens
    for number, item in enumerate(items):
        ids, counted = (torch.tensor(found[:left], device="cpu") for found in _tokens(name, number, item, tokenizer))
        texts.append((ids, counted.bool()))
        left -= len(ids)
        if left <= 0:
            break
    rows = Rows((ids for ids, _ in texts), (counted for _, counted in texts)).cut(max_length)
    if not any(bool(counted[1:].any()) for counted in rows.counted):
        raise GuardError(f"texts[{name!r}] has no two tokens in a row, so there is nothing to predict: is it empty?")
    return rows


def digest(rows: Iterable[Tensor]) -> str:
    """SHA-256 of rows of tokens."""
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row).to_bytes(8, "little") + row.to(torch.int64).numpy().tobytes())
    return found.hexdigest()


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a text that is too long for a path
        return False


def _paragraphs(name: str, path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"texts[{name!r}]: {path} cannot be read as UTF-8 text ({error}).") from error
    return [part for part in content.split("\n\n") if part.strip()] or [""]


def _tokens(name: str, number: int, item: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of an item, and which of them count."""
    if isinstance(item, Tensor) and item.ndim == 1:
        return item.tolist(), [True] * len(item)
    if tokenizer is None:
        raise GuardError("Texts need the model's tokenizer: give it to the trainer as processing_class.")
    if isinstance(item, str):
        ids = list(tokenizer(item)["input_ids"])
        return ids, [True] * len(ids)
    messages = item.get("messages", item) if isinstance(item, Mapping) else item
    if isinstance(messages, Sequence) and messages and all(isinstance(one, Mapping) for one in messages):
        if not getattr(tokenizer, "chat_template", None):
            raise GuardError(
                f"texts[{name!r}] has conversations, and the tokenizer has no chat template to lay them out: give "
                "texts, or set tokenizer.chat_template."
            )
        return _conversation(messages, tokenizer)
    raise GuardError(
        f"texts[{name!r}][{number}] is {type(item).__name__}: a text, a conversation (a list of messages) or a row of "
        "tokens (a tensor of one dimension) is expected."
    )


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """What users and assistants say counts; all does where a template or a tokenizer does not tell where that is."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    known = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=known)
    ids = list(encoded["input_ids"])
    said, end = [], 0
    for message in messages:
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else None
        begin = -1 if content is None else text.find(content, end)
        if content is None or begin < 0 or not known:
            return ids, [True] * len(ids)
        end = begin + len(content)
        if message.get("role") != "system":
            said.append((begin, end))
    return ids, [any(a < end and b > begin for begin, end in said) for a, b in encoded["offset_mapping"]]
