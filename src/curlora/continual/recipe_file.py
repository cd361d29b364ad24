"""Read a recipe from its file: YAML with variables, changes from the command line, and paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from curlora.continual.errors import RecipeError
from curlora.continual.grid import expand
from curlora.continual.problems import describe_errors, place
from curlora.continual.recipe import Recipe
from curlora.hub import no_such_folder

__all__ = ["load_recipe", "packaged_recipes"]


def packaged_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with curlora, by name."""
    folder = Path(str(resources.files("curlora").joinpath("recipes")))
    # The demo's recipes are left out: `curlora demo` downloads their files first.
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem not in ("demo", "demo-full")}


def load_recipe(path: Path | str, changes: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file, or the name of a recipe that comes with curlora.
        changes: strings ``key.key=value``, with a number in place of a key for an entry of a list; the value is YAML.
        folder: the folder that paths in the recipe are relative to; the recipe's own folder if ``None``.

    Raises:
        RecipeError: if the file does not exist or is not YAML; or naming every entry that is missing, unknown or not
            allowed.
    """
    path = Path(path)
    if not path.exists() and str(path) in packaged_recipes():
        path = packaged_recipes()[str(path)]
    try:
        content, written, wrong = _read(path, changes, folder or path.absolute().parent)
    except OSError as error:
        near = difflib.get_close_matches(path.stem, packaged_recipes(), n=1)
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}. It is neither a file nor one of the recipes that come with "
            f"curlora: {', '.join(packaged_recipes())}." + (f" Did you mean {near[0]!r}?" if near else "")
        ) from error
    content["methods"] = _expanded(content.get("methods"), wrong)
    lines = [f"{where}: {what}" for where, what in wrong.items()]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        told = tuple(f"{where}{end}" for where in wrong for end in (":", " "))
        # An error that is not about a value of the grid is the same in all of an entry's methods: it is named once.
        named = {**content, "methods": _with_entrys_names(content["methods"])}
        said = describe_errors(error, Recipe, named)
        lines += [one for one in said if not one.startswith(told) and one.partition(": ")[2] not in wrong.values()]
    if lines:
        raise RecipeError(f"{path} is not a recipe that can be run:\n" + "\n".join(f"  {line}" for line in lines))
    recipe._written.update(written)
    return recipe


def _expanded(methods: Any, wrong: dict[str, str]) -> Any:
    """Return the methods with their grids expanded. A grid that is wrong is added to ``wrong``, without its values."""
    if not isinstance(methods, list):
        return methods
    found: list[Any] = []
    for number, method in enumerate(methods):
        try:
            found += expand(method) if isinstance(method, dict) else [method]
        except ValueError as error:
            wrong[place(["methods", number], {"methods": methods})] = str(error)
            found.append(method)
    return found


def _with_entrys_names(methods: Any) -> Any:
    if not isinstance(methods, list):
        return methods
    return [{**one, "name": one["name"].partition("@")[0]} if _is_named(one) else one for one in methods]


def _is_named(method: Any) -> bool:
    return isinstance(method, dict) and isinstance(method.get("name"), str)


def _read(path: Path, changes: Sequence[str], folder: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Read a YAML file, apply changes to it, fill in its variables, and make its paths absolute.

    Variables are OmegaConf's: ``${training.epochs}`` refers to another entry and ``${oc.env:NAME}`` to an environment
    variable; ``\\${`` is a literal ``${``. ``${NAME}`` is short for ``${oc.env:NAME}`` unless a recipe has a key of
    that name.

    Args:
        path: the file.
        changes: strings ``key.key=value``, with a number in place of a key for an entry of a list; the value is YAML.
        folder: the folder that paths are relative to.

    Returns:
        A triple of the content; a mapping from each path, and the model's folder, to how it was written; and the
        problems by their places. A problem is a variable without a value, which is ``"???"`` in the content, or a
        model's folder that does not exist.

    Raises:
        OSError: if there is no such file.
        RecipeError: if the file is not YAML, or a change names no place in it.
    """
    try:
        config = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, DictConfig) or not config:
        raise RecipeError(
            f"{path} is not a recipe: a mapping with title, model, tasks, methods and heldout is expected"
        )
    for change in changes:
        _apply(config, change)
    keys = Recipe.model_fields
    as_written: Any = OmegaConf.to_container(config)
    wrong: dict[str, str] = {}
    try:
        content = _filled_in(OmegaConf.create(_with_environment(as_written, keys)), as_written, [], keys, wrong)
    except RecursionError:
        raise RecipeError(f"{path}: a variable refers to an entry that contains the variable itself") from None
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
        raise RecipeError(f"{change!r} is not a valid change: key.key=value is expected")
    try:
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        OmegaConf.update(config, key, value["value"], merge=False, force_add=True)
    except yaml.YAMLError as error:
        raise RecipeError(f"{change!r}: the value after = is not YAML: {error}") from error
    except (OmegaConfBaseException, ValueError, IndexError, TypeError, AssertionError) as error:
        raise RecipeError(f"{change!r} names no place in the recipe: {str(error).partition(chr(10))[0]}") from error


_SHORT = re.compile(r"(?<!\\)((?:\\\\)*)\$\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}")


def _with_environment(content: Any, keys: Collection[str]) -> Any:
    """Replace each ``${NAME}`` that is not a key of a recipe by ``${oc.env:NAME}``."""
    if isinstance(content, dict):
        return {key: _with_environment(value, keys) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_environment(value, keys) for value in content]
    if not isinstance(content, str):
        return content
    return _SHORT.sub(lambda m: m[0] if m[2] in keys else f"{m[1]}${{oc.env:{m[2]}}}", content)


def _filled_in(config: Any, as_written: Any, location: list[Any], keys: Collection[str], wrong: dict[str, str]) -> Any:
    """Return plain values, with each variable replaced by its value if it has one."""
    if not isinstance(config, (DictConfig, ListConfig)):
        return config
    values: dict[Any, Any] = {}
    entries: Iterable[Any] = config if isinstance(config, DictConfig) else range(len(config))
    for key in entries:
        here = [*location, key]
        try:
            values[key] = _filled_in(config[key], as_written, here, keys, wrong)
        except OmegaConfBaseException as error:
            values[key] = "???"  # any other error about this place is dropped later
            wrong[place(here, as_written)] = _explained(error, keys)
    return values if isinstance(config, DictConfig) else list(values.values())


def _explained(error: OmegaConfBaseException, keys: Collection[str]) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "??? stands for a missing value; give one, for example with --set"
    unset = re.search(r"Environment variable '(.+?)' not found", str(error))
    if unset is None:
        return str(error).strip().partition("\n")[0]
    near = difflib.get_close_matches(unset[1], keys, n=1)
    return f"the environment variable {unset[1]} is not set" + (f". Is the key {near[0]!r} meant?" if near else "")


def _with_paths(content: Any, as_written: Any, folder: Path, written: dict[str, str], key: str = "") -> Any:
    """Return the content with absolute paths, and record in ``written`` how they were written."""
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
