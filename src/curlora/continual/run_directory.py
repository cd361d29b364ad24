"""The directory of a run: its recipe, its lock, and its disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
from accelerate.utils import broadcast_object_list

from curlora.continual.errors import RunError
from curlora.continual.method_spec import MethodSpec
from curlora.continual.processes import process_state
from curlora.continual.recipe import Recipe
from curlora.storage import LOCK, disk_full, is_disk_full, locked, write_whole

__all__ = ["claim", "in_use"]

_SAVED = "recipe.json"


@contextlib.contextmanager
def in_use(directory: Path, begin: Callable[[], None]) -> Iterator[None]:
    """Lock a directory for one run; the first process holds the lock for all processes of the run.

    Args:
        directory: the run directory; created if missing.
        begin: called by the first process when it holds the lock.

    Raises:
        RunError: if another run holds the lock, if ``begin`` raises it, or if the disk is full. safetensors and torch
            raise their own errors for a full disk.
    """
    state = process_state()
    refusal: list[str | None] = [None]
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            try:
                held.enter_context(locked(directory))
                begin()
            except RunError as error:
                refusal = [str(error)]
            except filelock.Timeout:
                refusal = [f"{directory} is in use by another run. Wait for it, or choose another folder."]
            except OSError as error:
                unusable = f"{directory} cannot be used as a run directory: {error.strerror}. Choose another folder."
                refusal = [disk_full(directory) if is_disk_full(error) else unusable]
        if state.num_processes > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise RunError(refusal[0])
        try:
            yield
        except Exception as error:
            if not is_disk_full(error) and shutil.disk_usage(directory).free > 1 << 20:
                raise
            raise RunError(disk_full(directory)) from error


def claim(recipe: Recipe, directory: Path) -> None:
    """Check that a directory is empty or belongs to a recipe, and save the recipe in it.

    Raises:
        RunError: if the directory holds a run of another recipe, or other files.
    """
    saved = directory / _SAVED
    recipe = recipe.portable()
    if saved.exists():
        try:
            before = Recipe.model_validate_json(saved.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{saved} cannot be read, so it is unknown whether {directory} belongs to this recipe. Choose another "
                f"folder, or remove {saved} if you are sure that it does."
            ) from error
        changed = _changes(before, recipe, directory)
        if changed and any(directory.glob("*/seed-*")):  # else the other recipe has trained nothing
            raise RunError(
                f"{directory} holds a run of another recipe: {', '.join(changed)} changed. Choose another folder, undo "
                "the change, or remove the folder."
            )
    elif any(path.name != LOCK for path in directory.iterdir()):
        raise RunError(f"{directory} holds files, but no run. Choose another folder.")
    write_whole(saved, recipe.model_dump_json(indent=2))


def _changes(before: Recipe, now: Recipe, directory: Path) -> list[str]:
    def known(recipe: Recipe) -> dict[str, Any]:
        """Return the parts that figures depend on."""
        tasks = [task.model_copy(update={"description": ""}) for task in recipe.tasks]
        parts = ("model", "heldout", "guard", "protocol", "switches", "reference")
        training = recipe.training.changed({"cache_frozen_layers": False})  # changes no figure
        return {**{part: getattr(recipe, part) for part in parts}, "tasks": tasks, "training": training}

    def methods(recipe: Recipe) -> dict[str, MethodSpec]:
        return {method.name: method.model_copy(update={"label": None}) for method in recipe.methods}

    old, new = known(before), known(now)
    begun = {name: method for name, method in methods(before).items() if (directory / name).exists()}
    changed = [f"method {name!r}" for name, method in begun.items() if methods(now).get(name) != method]
    # Folders are named by the position of an order, so new orders may only be appended.
    reordered = ["orders"] if now.orders[: len(before.orders)] != before.orders else []
    return [part for part in new if old[part] != new[part]] + reordered + changed
