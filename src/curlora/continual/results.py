"""What a run leaves behind in ``results.json``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from curlora.continual import metrics

__all__ = ["SCHEMA_VERSION", "MethodResult", "ResultsError", "RunResults", "TaskInfo", "environment", "write_whole"]

SCHEMA_VERSION = 1


class ResultsError(ValueError):
    """A file does not hold the results of a run."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TaskInfo(_Record):
    """A task of the stream, without its texts."""

    name: str
    description: str
    labels: list[str]
    train_examples: int
    evaluation_examples: int
    majority_rate: float


class MethodResult(_Record):
    """What one method did over the stream.

    ``accuracy[i][j]`` is the accuracy on task ``j`` after task ``i``; ``perplexity[0]`` is the base
    model's, ``perplexity[i + 1]`` the one after task ``i``. ``losses`` are ``(step, loss)`` over the
    whole stream. Sizes in bytes, times in seconds.
    """

    name: str
    label: str
    learning_rate: float
    trainable_parameters: int
    adapter_bytes: int
    accuracy: list[list[float]]
    perplexity: list[float]
    losses: list[tuple[int, float]]
    train_tokens: int
    train_seconds: float
    seconds: float

    @property
    def average_accuracy(self) -> float:
        return metrics.average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float | None:
        return metrics.forgetting(self.accuracy)

    @property
    def perplexity_rise(self) -> float:
        """Relative rise of the perplexity over the whole stream; 0.01 is one per cent."""
        return self.perplexity[-1] / self.perplexity[0] - 1


class RunResults(_Record):
    """A whole run: one stream, several methods."""

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    base_model: str
    base_parameters: int
    heldout: str
    seed: int
    settings: dict[str, float | int | str]
    environment: dict[str, str]
    tasks: list[TaskInfo]
    methods: list[MethodResult]

    def save(self, path: Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunResults:
        """Read what :meth:`save` wrote.

        Raises:
            ResultsError: if the file is not a run's results, naming the file and the field.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResultsError(f"{path} does not hold the results of a run: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """Versions and hardware, as far as results depend on them."""
    packages = ("curlora", "torch", "transformers", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }
