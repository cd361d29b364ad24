"""The state on disk of a method and seed that are being run, so that an interrupted run can be resumed.

``progress.json`` holds the number of learned tasks and the measurements. ``weights-<number>`` holds the weights after
that number of tasks, and ``weights-<number>-begun`` also what the next task starts with. Weights are complete before
``progress.json`` refers to them, and older weights are deleted after that; weights that it does not refer to may be
replaced. ``checkpoints`` holds the checkpoints of transformers' Trainer within a task.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from curlora.continual.errors import RunError
from curlora.continual.plugins import Plugin
from curlora.continual.processes import process_state
from curlora.continual.results import SeedResult
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import load_trained_state, trained_state
from curlora.storage import put_folder, write_whole

__all__ = ["State"]

_PROGRESS, _WEIGHTS, _CHECKPOINTS = "progress.json", "weights-", "checkpoints"
_FILE = "state.safetensors"


class _Saved(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")

    learned: int
    begun: int
    result: SeedResult


class State:
    """The state in one folder; only the first process writes it.

    Args:
        directory: the folder of the method and seed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def checkpoints(self, task: int) -> Path:
        """Return the folder of the Trainer's checkpoints within task number ``task``."""
        return self.directory / _CHECKPOINTS / f"task-{task}"

    def load(
        self, model: TaskModel, plugins: Sequence[Plugin], begin: Callable[[int], None]
    ) -> tuple[int, int, SeedResult] | None:
        """Load the saved state.

        Args:
            model: the model as a fresh run starts with it.
            plugins: the plug-ins as a fresh run starts with them.
            begin: adds to the model what the task of a number trains; called for every task that has begun.

        Returns:
            The number of learned tasks, the number of tasks that have begun, and the measurements; ``None`` if nothing
            was saved.

        Raises:
            RunError: if the state cannot be read.
        """
        path = self.directory / _PROGRESS
        if not path.exists():
            return None
        try:
            saved = _Saved.model_validate_json(path.read_text(encoding="utf-8"))
            weights = load_file(self.directory / _name(saved.learned, saved.begun) / _FILE)
        except (ValueError, OSError, SafetensorError) as error:
            raise _unreadable(self.directory, error) from error
        for number in range(saved.begun):
            begin(number)
        try:
            load_trained_state(model, _part(weights, "model."))
        except ValueError as error:
            raise _unreadable(self.directory, error) from error
        for number, plugin in enumerate(plugins):
            plugin.load_state_dict(_part(weights, f"plugin{number}."))
        return saved.learned, saved.begun, saved.result

    def save_weights(
        self, learned: int, begun: int, model: TaskModel, plugins: Sequence[Plugin], result: SeedResult
    ) -> None:
        """Save the weights and the measurements after ``learned`` tasks.

        ``begun`` is ``learned``, or ``learned + 1`` if the weights include everything that the next task starts with.
        """
        if process_state().is_main_process:
            state = {f"model.{name}": value for name, value in trained_state(model).items()}
            for number, plugin in enumerate(plugins):
                state.update({f"plugin{number}.{name}": value for name, value in plugin.state_dict().items()})
            put_folder(self.directory / _name(learned, begun), lambda folder: save_file(state, folder / _FILE))
        self.save_result(learned, begun, result)

    def save_result(self, learned: int, begun: int, result: SeedResult) -> None:
        """Save the measurements; ``learned`` and ``begun`` are the numbers that the weights were saved with."""
        if process_state().is_main_process:
            saved = _Saved(learned=learned, begun=begun, result=result)
            write_whole(self.directory / _PROGRESS, saved.model_dump_json())
            for older in self.directory.glob(f"{_WEIGHTS}*"):
                if older.name != _name(learned, begun):
                    shutil.rmtree(older)
            shutil.rmtree(self.checkpoints(learned - 1), ignore_errors=True)
        process_state().wait_for_everyone()

    def forget(self) -> None:
        """Delete the state."""
        (self.directory / _PROGRESS).unlink(missing_ok=True)
        for folder in [*self.directory.glob(f"{_WEIGHTS}*"), self.directory / _CHECKPOINTS]:
            shutil.rmtree(folder, ignore_errors=True)


def _name(learned: int, begun: int) -> str:
    return f"{_WEIGHTS}{learned}" + ("-begun" if begun > learned else "")


def _unreadable(directory: Path, error: Exception) -> RunError:
    return RunError(
        f"{directory} holds an interrupted run whose state cannot be read. Remove that folder to run this method and "
        f"seed again. ({error})"
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
