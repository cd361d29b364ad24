"""Merge runs that were measured under the same conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from curlora.continual.results import MethodResult, RunResults, name_of
from curlora.continual.settings import Settings

__all__ = ["definition", "differing", "unite"]


def unite(runs: Sequence[RunResults]) -> list[RunResults]:
    """Merge runs that differ only in methods and seeds.

    Methods with the same name and definition become one method with the seeds of all. If a seed occurs more than once,
    the first run's result is kept. Methods with the same name but different definitions stay separate, and the later
    ones are numbered. Title and tasks are the first run's; dates and versions that differ are listed.

    Args:
        runs: the runs; earlier ones take precedence.

    Returns:
        The merged runs, in the order of the first run of each.
    """
    groups: list[list[RunResults]] = []
    for run in runs:
        group = next((group for group in groups if not differing([group[0], run])), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return [group[0] if len(group) == 1 else _united(group) for group in groups]


def differing(runs: Sequence[RunResults]) -> list[str]:
    """Name the conditions, apart from methods and seeds, in which any of the runs differ."""
    first, *others = [_conditions(run) for run in runs]
    return [
        name + _which(value, [other[name] for other in others])
        for name, value in first.items()
        if any(other[name] != value for other in others)
    ]


def _which(value: Any, others: Sequence[Any]) -> str:
    """Name the entries in which dictionaries differ: `` (epochs, batch_size)``."""
    if not isinstance(value, dict):
        return ""
    names = dict.fromkeys(name for one in (value, *others) for name in one)
    found = [name for name in names if any(other.get(name) != value.get(name) for other in others)]
    return f" ({', '.join(found)})"


_COUNTED = {f"{split}_{done}" for split in ("train", "evaluation") for done in ("cut", "dropped")}
_COUNTED.add("evaluation_in_train")


def _conditions(run: RunResults) -> dict[str, Any]:
    recipe = run.recipe or {}
    model = {key: value for key, value in recipe.get("model", {}).items() if key != "name"}  # it may be a path
    own = {f"training of {task['name']}": task["training"] for task in recipe.get("tasks", []) if "training" in task}
    return {
        "base model": (run.base_model, run.base_parameters, model),
        # These counts follow from the settings; runs of earlier versions do not have them.
        "tasks": {task.name: task.model_dump(exclude=_COUNTED) for task in run.tasks},
        "order of the tasks": [task.name for task in run.tasks],
        "held-out texts": run.heldout,
        "texts that methods use": run.shown,
        "first held-out text": next(iter(run.heldout)),  # summaries show it
        "protocol": dict.fromkeys(run.protocol, True),
        "settings": {**_settings(run), **own},
    }


def _settings(run: RunResults) -> dict[str, Any]:
    """Return the settings that figures depend on. Runs of earlier versions lack the newest, and had their defaults."""
    settings = {**Settings().model_dump(mode="json"), **run.settings}
    return {name: value for name, value in settings.items() if name != "cache_frozen_layers"}


def _united(runs: Sequence[RunResults]) -> RunResults:
    done = {
        name_of(method.name, seed.seed, seed.order) for run in runs for method in run.methods for seed in method.seeds
    }
    return runs[0].model_copy(
        update={
            "created": ", ".join(_distinct(run.created for run in runs)),
            "recipe": _recipe([run.recipe for run in runs]),
            "limits": {
                figure: sorted({value for run in runs for value in run.limits.get(figure, [])})
                for figure in _distinct(figure for run in runs for figure in run.limits)
            },
            "missing": [name for name in _distinct(name for run in runs for name in run.missing) if name not in done],
            "environment": {
                key: "; ".join(_distinct(run.environment[key] for run in runs if key in run.environment))
                for key in _distinct(key for run in runs for key in run.environment)
            },
            "methods": _methods(runs),
        }
    )


def _methods(runs: Sequence[RunResults]) -> list[MethodResult]:
    by_name: dict[str, list[MethodResult]] = {}
    for method in (method for run in runs for method in run.methods):
        variants = by_name.setdefault(method.name, [])
        for number, known in enumerate(variants):
            if definition(known) == definition(method):
                variants[number] = _with_seeds_of(known, method)
                break
        else:
            variants.append(method)
    return [_numbered(method, n) for variants in by_name.values() for n, method in enumerate(variants, start=1)]


def definition(method: MethodResult) -> Any:
    """Return everything that defines a method except its names."""
    return method.method, method.options, method.plugins, method.learning_rate, method.training


def _with_seeds_of(method: MethodResult, other: MethodResult) -> MethodResult:
    known = {(seed.seed, *seed.order) for seed in method.seeds}
    new = [seed for seed in other.seeds if (seed.seed, *seed.order) not in known]
    return method.model_copy(update={"seeds": method.seeds + new})


def _numbered(method: MethodResult, number: int) -> MethodResult:
    if number == 1:
        return method
    return method.model_copy(update={key: f"{getattr(method, key)} ({number})" for key in ("name", "label")})


def _recipe(recipes: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    first, *others = _distinct(recipes)
    if not others:
        return first
    known = [recipe for recipe in (first, *others) if recipe is not None]
    if len(known) <= len(others):
        return None
    methods = _distinct(method for recipe in known for method in recipe.get("methods", []))
    seeds = _distinct(seed for recipe in known for seed in recipe.get("seeds", [0]))
    return {**known[0], "methods": methods, "seeds": seeds}


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
