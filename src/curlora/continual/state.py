"""What a method and seed have on the disk while they are being run, so that a run that is cut off can go on.

``progress.json`` says how many tasks have been learned and what was measured, ``weights-<that number>`` holds what was
learned, or ``weights-<that number>-begun`` that and what the next one begins with. The weights are there before
``progress.json`` names them, and older ones go after that; weights that it does not name may be replaced.
``checkpoints`` is transformers' Trainer's, within a task.
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
from curlora.continual.storage import put_folder, write_whole
from curlora.continual.task_model import TaskModel
from curlora.continual.trainer import load_trained_state, trained_state

__all__ = ["State"]

_PROGRESS, _WEIGHTS, _CHECKPOINTS = "progress.json", "weights-", "checkpoints"
_FILE = "state.safetensors"


class _Saved(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")

    learned: int
    begun: int
    result: SeedResult


class State:
    """The state in one folder; written by the first process alone.

    Args:
        directory: of the method and seed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def checkpoints(self, task: int) -> Path:
        """Where the Trainer's checkpoints within the task of that number go."""
        return self.directory / _CHECKPOINTS / f"task-{task}"

    def load(
        self, model: TaskModel, plugins: Sequence[Plugin], begin: Callable[[int], None]
    ) -> tuple[int, int, SeedResult] | None:
        """Take over what was saved, if anything was.

        Args:
            model: as a fresh run would begin with it.
            plugins: as a fresh run would begin with them.
            begin: puts what the task of a number trains on the model: called for every task that has begun.

        Returns:
            How many tasks have been learned, how many have begun, and what was measured.

        Raises:
            RunError: if it cannot be read.
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
        """That many tasks have been learned, and as many have begun, or one more with all that it begins with."""
        if process_state().is_main_process:
            state = {f"model.{name}": value for name, value in trained_state(model).items()}
            for number, plugin in enumerate(plugins):
                state.update({f"plugin{number}.{name}": value for name, value in plugin.state_dict().items()})
            put_folder(self.directory / _name(learned, begun), lambda folder: save_file(state, folder / _FILE))
        self.save_result(learned, begun, result)

    def save_result(self, learned: int, begun: int, result: SeedResult) -> None:
        """What was measured; ``learned`` and ``begun`` as they were saved with the weights."""
        if process_state().is_main_process:
            saved = _Saved(learned=learned, begun=begun, result=result)
            write_whole(self.directory / _PROGRESS, saved.model_dump_json())
            for older in self.directory.glob(f"{_WEIGHTS}*"):
                if older.name != _name(learned, begun):
                    shutil.rmtree(older)
            shutil.rmtree(self.checkpoints(learned - 1), ignore_errors=True)
        process_state().wait_for_everyone()

    def forget(self) -> None:
        """Remove all of it."""
        (self.directory / _PROGRESS).unlink(missing_ok=True)
        for folder in [*self.directory.glob(f"{_WEIGHTS}*"), self.directory / _CHECKPOINTS]:
            shutil.rmtree(folder, ignore_errors=True)


def _name(learned: int, begun: int) -> str:
    return f"{_WEIGHTS}{learned}" + ("-begun" if begun > learned else "")


def _unreadable(directory: Path, error: Exception) -> RunError:
    return RunError(
        f"{directory} holds a run that was cut off and whose state cannot be read. Remove that folder to run this "
        f"method and seed again. ({error})"
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
