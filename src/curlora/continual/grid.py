"""Grids of methods: ``{grid: [a, b]}`` in place of a value stands for one method with ``a`` and one with ``b``."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["expand"]


class _Grid(NamedTuple):
    path: tuple[str | int, ...]
    """Where the grid stands in the entry: keys, and positions in lists."""
    names: tuple[str, ...]
    """The same path for messages: an entry of a list goes by its own name if it has one."""
    choices: list[Any]


def expand(method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the methods that an entry of a recipe stands for: one for each combination of its grids' values.

    A method's name is the entry's name, ``@``, and its values, such as ``lora@learning_rate=0.001,r=16``. Its ``grid``
    holds the values by the same keys. An entry without a grid gives one method.

    >>> [one["name"] for one in expand({"name": "lora", "options": {"r": {"grid": [8, 16]}}})]
    ['lora@r=8', 'lora@r=16']

    Args:
        method: the recipe's entry, not validated yet.

    Raises:
        ValueError: if a grid is not a list of two or more distinct values.
    """
    grids = list(_grids(method))
    if not grids:
        return [dict(method)]
    if fixed := [grid.names[0] for grid in grids if grid.names[0] in ("name", "label", "method")]:
        raise ValueError(f"{fixed[0]}: a grid may not stand here: its methods get their names from its values")
    keys = [_key(grid, grids) for grid in grids]
    label = method.get("label") or method.get("name")
    expanded = []
    texts = [_texts(grid.choices) for grid in grids]
    for values, plain in zip(
        itertools.product(*(grid.choices for grid in grids)), itertools.product(*texts), strict=True
    ):
        shown = list(zip(keys, plain, strict=True))
        one = _replaced(method, {grid.path: value for grid, value in zip(grids, values, strict=True)})
        one["name"] = f"{method.get('name')}@" + ",".join(f"{key}={value}" for key, value in shown)
        one["label"] = f"{label}, " + ", ".join(f"{key} {value}" for key, value in shown)
        one["grid"] = dict(zip(keys, values, strict=True))
        expanded.append(one)
    return expanded


def _grids(value: Any, path: tuple[str | int, ...] = (), names: tuple[str, ...] = ()) -> Iterator[_Grid]:
    if isinstance(value, Mapping) and path and "grid" in {str(key).lower() for key in value}:
        if set(value) != {"grid"}:
            raise ValueError(
                f"{'.'.join(names)}: a grid is written {{grid: [...]}} and stands alone, got {dict(value)}"
            )
        choices = value["grid"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{'.'.join(names)}: a grid must be a list of two or more values, got {choices!r}")
        if len({json.dumps(choice, sort_keys=True, default=str) for choice in choices}) < len(choices):
            raise ValueError(f"{'.'.join(names)}: the grid {choices!r} holds a value twice")
        yield _Grid(path, names, choices)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _grids(inner, (*path, key), (*names, str(key)))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            name = inner.get("name", place) if isinstance(inner, Mapping) else place
            yield from _grids(inner, (*path, place), (*names, str(name)))


def _key(grid: _Grid, grids: list[_Grid]) -> str:
    """Return the shortest end of the grid's path that no other grid shares."""
    others = [other.names for other in grids if other is not grid]
    lengths = range(1, len(grid.names) + 1)
    length = next((n for n in lengths if all(other[-n:] != grid.names[-n:] for other in others)), len(grid.names))
    return ".".join(grid.names[-length:])


def _replaced(value: Any, chosen: Mapping[tuple[str | int, ...], Any], path: tuple[str | int, ...] = ()) -> Any:
    if path in chosen:
        return chosen[path]
    if isinstance(value, Mapping):
        return {key: _replaced(inner, chosen, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, chosen, (*path, place)) for place, inner in enumerate(value)]
    return value


_LONGEST = 48  # characters of a value in a name, which is also that of a folder


def _texts(choices: list[Any]) -> list[str]:
    """Return each value as text that may be part of a folder's name. Different values have different texts."""
    plain = [
        re.sub(r"[^A-Za-z0-9_.+-]+", "-", f"{value:g}" if isinstance(value, float) else str(value)).strip("-")
        for value in choices
    ]
    folded = [text.casefold() for text in plain]
    return [
        text if len(text) <= _LONGEST and folded.count(text.casefold()) == 1 else f"{text[:_LONGEST]}-{_digest(value)}"
        for text, value in zip(plain, choices, strict=True)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
