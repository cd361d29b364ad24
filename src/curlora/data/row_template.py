"""Templates of text filled in with a row's columns: ``"Question: {question}"`` or ``"{answers[text][0]}"``."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["RowTemplate", "RowTemplateError"]


class RowTemplateError(ValueError):
    """A template is invalid, or a row cannot fill it; the message says why."""


class RowTemplate(string.Formatter):
    """A template in Python's format syntax, filled in with the columns of a row.

    Indices reach nested values: positions of lists, keys of dicts. Only strings, numbers and booleans can be filled in.
    Other values are rejected instead of being written in Python's notation.

    >>> RowTemplate("{question} {answers[text][0]}", ["question", "answers"]).fill(
    ...     {"question": "Who?", "answers": {"text": ["Ada", "Lovelace"]}}
    ... )
    'Who? Ada'

    Args:
        given: the template, or the name of a column.
        columns: the names of the table's columns.

    Raises:
        RowTemplateError: if it is not a valid template, or names an unknown column.
    """

    def __init__(self, given: str, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.template = given if "{" in given else f"{{{given}}}"
        try:
            names = [name for _, name, _, _ in self.parse(self.template) if name is not None]
        except ValueError as error:
            raise RowTemplateError(f"{given!r} is not a valid template: {error}") from error
        for name in names:
            self._split(name)

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row.

        Raises:
            RowTemplateError: if the row lacks a value, or has one that is not a string, number or boolean.
        """
        try:
            return self.vformat(self.template, (), row)
        except RowTemplateError:
            raise
        except ValueError as error:  # such as a format specification for numbers
            raise RowTemplateError(f"does not fit {self.template!r}: {error}") from error

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        column, keys = self._split(field_name)
        value = kwargs.get(column)
        for key in keys:
            value = _item(value, key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise RowTemplateError(f"has no {field_name}")
        if not isinstance(value, (str, int, float)):
            raise RowTemplateError(f"has {_kind(value)} in {field_name}, not text{_advice(field_name, value)}")
        return value, column

    def _split(self, name: str) -> tuple[str, list[str]]:
        """Return the column and the indices into it."""
        if name in self.columns:
            return name, []
        column, rest = re.fullmatch(r"([^\[]*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        keys = re.findall(r"\[([^\[\]]+)\]", rest)
        if column not in self.columns:
            before, dot, after = column.partition(".")
            if dot and before in self.columns:
                raise RowTemplateError(f"a value inside a column is written with brackets: {before}[{after}]")
            raise RowTemplateError(f"there is no column {column!r} among {', '.join(self.columns)}")
        if "".join(f"[{key}]" for key in keys) != rest:
            raise RowTemplateError(f"{name!r} is not a column with indices, such as {column}[0]")
        return column, keys


def _item(value: Any, key: str) -> Any:
    """Return the item at ``key``, or ``None``."""
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and re.fullmatch(r"-?\d+", key):
        position = int(key)
        return value[position] if -len(value) <= position < len(value) else None
    return None


def _kind(value: Any) -> str:
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"


def _advice(name: str, value: Any) -> str:
    """Return advice on how to reach text inside the value."""
    start = name
    while True:
        if isinstance(value, Mapping) and value:
            key = next((key for key, inside in value.items() if inside is not None), next(iter(value)))
            name, value = f"{name}[{key}]", value[key]
        elif isinstance(value, list) and value:
            name, value = f"{name}[0]", value[0]
        else:
            return "" if name == start else f": use a value inside it, such as {{{name}}}"
