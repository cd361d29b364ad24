"""A recipe's file becomes its content: YAML with variables, changes from the command line, and paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from curlora.continual.errors import RecipeError
from curlora.continual.problems import place
from curlora.hub import no_such_folder

__all__ = ["read_recipe_file"]


def read_recipe_file(
    path: Path, changes: Sequence[str], folder: Path, keys: Collection[str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Read a YAML file, apply changes to it, fill in its variables, and make its paths absolute.

    Variables are OmegaConf's: ``${training.epochs}`` is another entry, ``${oc.env:NAME}`` a variable of the
    environment, and ``\\${`` begins none. ``${NAME}`` is short for ``${oc.env:NAME}`` unless a recipe has a key of that
    name.

    Args:
        path: the file.
        changes: ``key.key=value`` each, a number in the place of a key for an entry of a list; the value is YAML.
        folder: what paths are relative to.
        keys: of a recipe.

    Returns:
        The content; for each path, and the model's folder, how it was written; and what is wrong, by its place: a
        variable without a value, for which ``None`` stands, and a model's folder that is not there.

    Raises:
        OSError: if there is no such file.
        RecipeError: if it is not YAML, or a change names no place.
    """
    try:
        config = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, DictConfig) or not config:
        raise RecipeError(
            f"{path} holds no recipe: a mapping with title, model, tasks, methods and heldout is expected"
        )
    for change in changes:
        _apply(config, change)
    as_written: Any = OmegaConf.to_container(config)
    wrong: dict[str, str] = {}
    try:
        content = _filled_in(OmegaConf.create(_with_environment(as_written, keys)), as_written, [], keys, wrong)
    except RecursionError:
        raise RecipeError(f"{path}: a variable refers to what it is a part of") from None
    written: dict[str, str] = {}
    content = _with_paths(content, as_written, folder, written)
    if isinstance(content.get("output"), str):
        content["output"] = str(Path(content["output"]).expanduser())
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        local = folder / Path(model["name"]).expanduser()
        if local.is_dir():
            written[str(local)] = as_written["model"]["name"]
            model["name"] = str(local)
        elif "model.name" not in wrong and (problem := no_such_folder(model["name"], folder)):
            wrong["model.name"] = problem
    return content, written, wrong


def _apply(config: DictConfig, change: str) -> None:
    key, found, text = change.partition("=")
    if not found:
        raise RecipeError(f"{change!r} is not a change: key.key=value is expected")
    try:
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        OmegaConf.update(config, key, value["value"], merge=False, force_add=True)
    except yaml.YAMLError as error:
        raise RecipeError(f"{change!r}: what is behind = is not YAML: {error}") from error
    except (OmegaConfBaseException, ValueError, IndexError, TypeError, AssertionError) as error:
        raise RecipeError(f"{change!r} names no place in the recipe: {str(error).partition(chr(10))[0]}") from error


_SHORT = re.compile(r"(?<!\\)((?:\\\\)*)\$\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}")


def _with_environment(content: Any, keys: Collection[str]) -> Any:
    """With ``${oc.env:NAME}`` for each ``${NAME}`` that is no key of a recipe."""
    if isinstance(content, dict):
        return {key: _with_environment(value, keys) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_environment(value, keys) for value in content]
    if not isinstance(content, str):
        return content
    return _SHORT.sub(lambda m: m[0] if m[2] in keys else f"{m[1]}${{oc.env:{m[2]}}}", content)


def _filled_in(config: Any, as_written: Any, location: list[Any], keys: Collection[str], wrong: dict[str, str]) -> Any:
    """Plain values, with each variable filled in that has a value."""
    if not isinstance(config, (DictConfig, ListConfig)):
        return config
    values: dict[Any, Any] = {}
    entries: Iterable[Any] = config if isinstance(config, DictConfig) else range(len(config))
    for key in entries:
        here = [*location, key]
        try:
            values[key] = _filled_in(config[key], as_written, here, keys, wrong)
        except OmegaConfBaseException as error:
            values[key] = "???"  # so that nothing else is said of it than what is about to be
            wrong[place(here, as_written)] = _explained(error, keys)
    return values if isinstance(config, DictConfig) else list(values.values())


def _explained(error: OmegaConfBaseException, keys: Collection[str]) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "??? stands for a value that is to be given, such as by --set"
    unset = re.search(r"Environment variable '(.+?)' not found", str(error))
    if unset is None:
        return str(error).strip().partition("\n")[0]
    near = difflib.get_close_matches(unset[1], keys, n=1)
    return f"the environment variable {unset[1]} is not set" + (f". Is the key {near[0]!r} meant?" if near else "")


def _with_paths(content: Any, as_written: Any, folder: Path, written: dict[str, str], key: str = "") -> Any:
    """With absolute paths; ``written`` gets how they were written."""
    if isinstance(content, dict):
        before = as_written if isinstance(as_written, dict) else {}
        return {name: _with_paths(v, before.get(name), folder, written, str(name)) for name, v in content.items()}
    if isinstance(content, list):
        several = as_written if isinstance(as_written, list) and len(as_written) == len(content) else content
        return [_with_paths(v, w, folder, written) for v, w in zip(content, several, strict=True)]
    if key in ("path", "prompts") and isinstance(content, str):
        path = str(folder / Path(content).expanduser())
        written[path] = as_written if isinstance(as_written, str) else content
        return path
    return content
