"""Error messages about a recipe: where the error is, what was found, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

__all__ = ["at_their_places", "describe_errors", "place", "unknown_names"]

# Keys of PEFT, transformers, TRL and Axolotl, and what the same thing is called here or in another adapter.
_ELSEWHERE = {
    "adapter": ["method"],
    "alpha": ["lora_alpha"],
    "base_model": ["model"],
    "datasets": ["tasks"],
    "dropout": ["lora_dropout", "curlora_dropout"],
    "eval": ["evaluation"],
    "lora_alpha": ["alpha"],
    "lora_dropout": ["curlora_dropout"],
    "lora_r": ["r"],
    "lora_rank": ["r"],
    "lora_target_modules": ["target_modules"],
    "lr": ["learning_rate"],
    "lr_scheduler_type": ["schedule"],
    "max_seq_length": ["max_length"],
    "max_steps": ["epochs"],
    "micro_batch_size": ["batch_size"],
    "modules": ["target_modules"],
    "num_epochs": ["epochs"],
    "num_train_epochs": ["epochs"],
    "per_device_train_batch_size": ["batch_size"],
    "per_device_eval_batch_size": ["evaluation_batch_size"],
    "rank": ["r"],
    "seed": ["seeds"],
    "sequence_len": ["max_length"],
    "test": ["evaluation"],
    "validation": ["evaluation"],
    "warmup_ratio": ["warmup"],
    "warmup_steps": ["warmup"],
}


# What pydantic expects, by the first word of an error's type.
_EXPECTED = {
    "bool": "must be true or false",
    "dict": "must be a mapping of keys to values",
    "float": "must be a number",
    "int": "must be a whole number",
    "model": "must be a mapping of keys to values",
    "path": "must be a path",
}


def unknown_names(owner: str, names: Iterable[object], known: Iterable[str], kind: str = "key") -> str:
    """Return a message that ``owner`` has no such names, with similar names that it has.

    >>> unknown_names("training", ["epoch"], ["epochs", "batch_size"])
    "training has no key 'epoch'. Did you mean 'epochs'?"
    """
    known = list(known)
    sentences = []
    for name in map(str, names):
        meant = [other for other in _ELSEWHERE.get(name, ()) if other in known]
        meant = meant or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        what = f"{owner} has no {kind} {name!r}."
        if meant:
            sentences.append(f"{what} Did you mean {' or '.join(map(repr, meant))}?")
        else:
            listed = f" It has {', '.join(known)}." if 0 < len(known) <= 40 else ""
            sentences.append(what + listed)
    return " ".join(sentences)


def place(location: Sequence[int | str], content: Any) -> str:
    """Return where an entry stands in a recipe, with methods, tasks and texts by their names.

    >>> place(["tasks", 0, "train", "limit"], {"tasks": [{"name": "sst2"}]})
    "task 'sst2': train.limit"
    """
    match list(location):
        case ["tasks" | "methods" | "heldout" as part, int() as number, *rest]:
            entries = content.get(part) if isinstance(content, dict) else None
            entry = entries[number] if isinstance(entries, list) and number < len(entries) else entries
            name = entry.get("name") if isinstance(entry, dict) else None
            owner = part.removesuffix("s") + (f" {name!r}" if isinstance(name, str) else f" number {number + 1}")
            return ": ".join([owner, *([".".join(map(str, rest))] if rest else [])])
    return ".".join(map(str, location))


def at_their_places(lines: Sequence[str]) -> PydanticCustomError:
    """Make one error of several messages, each of which names its place."""
    return PydanticCustomError("at_their_places", "{lines}", {"lines": "\n".join(lines)})


def describe_errors(error: ValidationError, model: type[BaseModel], content: Any, within: str = "") -> list[str]:
    """Return a line for each problem that pydantic found.

    Args:
        error: the error that validating ``content`` raised.
        model: the model that ``content`` was validated against.
        content: the input.
        within: where ``content`` stands in the recipe.
    """
    lines: list[str] = []
    extra: dict[tuple[int | str, ...], tuple[list[int | str], list[str]]] = {}
    for location, one in _joined(error.errors(), content):
        if one["type"] == "at_their_places":
            lines += one["msg"].split("\n")
        elif one["type"] == "extra_forbidden":
            extra.setdefault(one["loc"][:-1], (location[:-1], []))[1].append(str(one["loc"][-1]))
        else:
            where = ": ".join(part for part in (within, place(location, content)) if part)
            joint = " is missing" if one["type"] == "missing" else ": " if where else ""
            lines += [f"{where}{joint}{line}" for line in _message(one).split("\n")]
    for owned_by, (there, names) in extra.items():
        where = ": ".join(part for part in (within, place(there, content)) if part)
        owner = _model_at(model, owned_by)
        lines.append(unknown_names(where or "a recipe", names, owner.model_fields if owner else ()))
    return list(dict.fromkeys(lines))


def _joined(errors: Sequence[ErrorDetails], content: Any) -> list[tuple[list[int | str], ErrorDetails]]:
    """Return the errors with their locations, and one error for each value that may be of several types.

    Pydantic reports each type that the value is not, and what is wrong inside of it as a value of the type that it is.
    The second kind says more.
    """
    several: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for one in errors:
        several.setdefault(tuple(_existing(one, content)), []).append(one)
    found: list[tuple[list[int | str], ErrorDetails]] = []
    for where, group in several.items():
        types = [one for one in group if one["type"].endswith("_type")]
        inside = any(len(other) > len(where) and other[: len(where)] == where for other in several)
        if inside or len(types) < len(group):
            group = [one for one in group if one not in types]
        elif len(group) > 1:
            allowed = " or ".join(dict.fromkeys(_expected(one).removeprefix("must be ") for one in types))
            group = [{**types[0], "type": "union", "msg": f"must be {allowed}"}]
        found += [(list(where), one) for one in group]
    return found


def _expected(error: ErrorDetails) -> str:
    """Return what a value must be, in plain words."""
    message = _EXPECTED.get(error["type"].partition("_")[0], error["msg"].removeprefix("Value error, "))
    return message.replace("Input should be a valid", "must be a").replace("Input should be", "must be")


def _message(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return ""
    if error["type"] == "too_short":
        least, found = error["ctx"]["min_length"], error["ctx"]["actual_length"]
        return f"must have {least} {'entry' if least == 1 else 'entries'} or more, found {found}"
    if error["type"] == "string_too_short":
        return "must not be empty"
    message, found = _expected(error), error["input"]
    if error["type"] == "string_type" and isinstance(found, bool):
        return f"a string is expected, got {found}. Quote the value: YAML reads yes, no, on and off as booleans"
    told = error["type"] in ("value_error", "at_their_places") or isinstance(found, (dict, list, tuple, BaseModel))
    return message if told else f"{message}, got {found!r}"


def _existing(error: ErrorDetails, content: Any) -> list[int | str]:
    """Return an error's location without the names that pydantic adds for unions of types."""
    found: list[int | str] = []
    for number, key in enumerate(error["loc"]):
        missing = error["type"] == "missing" and number == len(error["loc"]) - 1
        if isinstance(content, dict) and (key in content or missing):
            content = content.get(key)
        elif isinstance(content, list) and isinstance(key, int) and key < len(content):
            content = content[key]
        elif not (isinstance(key, int) and isinstance(content, dict)):  # a single entry in place of a list
            continue
        found.append(key)
    return found


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """Return the model of the entry at a location."""
    found: type[BaseModel] | None = model
    several: list[type[BaseModel]] = []
    for key in location:
        if (chosen := next((one for one in several if one.__name__ == key), None)) is not None:
            found = chosen  # the member of a union, by its tag
        elif found is not None and isinstance(key, str) and key in found.model_fields:
            several = list(_models(found.model_fields[key].annotation))
            found = next(iter(several), None)
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
