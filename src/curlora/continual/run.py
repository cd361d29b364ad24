"""A whole run: every method over one stream, into one directory that can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase

from curlora.continual.methods import Method
from curlora.continual.perplexity import perplexity
from curlora.continual.results import MethodResult, RunResults, TaskInfo, environment, write_whole
from curlora.continual.sequence import HeldOut, Progress, Settings, run_method, work_of
from curlora.continual.tasks import Task

__all__ = ["RunDirectoryError", "Stream", "run_stream"]


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used; says why and what to do."""


@dataclass(frozen=True)
class Stream:
    """What is run.

    Args:
        title: of the report.
        base_model: the model's name, for people.
        load_model: gives a fresh causal language model each time it is called.
        tokenizer: the model's tokenizer.
        tasks: in order.
        methods: each starts from a fresh model; their names differ.
        heldout: the text whose perplexity is followed.
        settings: how to train.
        notes: further facts for the report.
    """

    title: str
    base_model: str
    load_model: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    methods: Sequence[Method]
    heldout: HeldOut
    settings: Settings
    notes: dict[str, Any] = field(default_factory=dict)


def run_stream(stream: Stream, directory: Path, progress: Callable[[float], Progress]) -> RunResults:
    """Run every method that ``directory`` does not hold already.

    A method's folder gets its ``result.json`` last, so a run that was cut off at any moment goes on with the
    method it was at, from the start of that method.

    Args:
        stream: what to run.
        directory: the run directory; made if missing.
        progress: given the whole amount of work, gives what hears about it.

    Returns:
        The measurements, also in ``directory / "results.json"``.

    Raises:
        RunDirectoryError: if another process runs in ``directory``, or a result in it cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / ".lock")
    try:
        with lock.acquire(timeout=0):
            results = _run(stream, directory, progress)
            Path(lock.lock_file).unlink(missing_ok=True)
            return results
    except filelock.Timeout:
        raise RunDirectoryError(
            f"{directory} is in use by another run. Wait for it, or choose another folder."
        ) from None


def _run(stream: Stream, directory: Path, progress: Callable[[float], Progress]) -> RunResults:
    finished = {method.name: _finished(directory / method.name) for method in stream.methods}
    todo = [method for method in stream.methods if finished[method.name] is None]
    listener = progress(sum(work_of(method, stream.tasks, stream.heldout, stream.settings) for method in todo))

    listener.stage("Base model: perplexity")
    model = stream.load_model()
    parameters = sum(p.numel() for p in model.parameters())
    before = perplexity(model, stream.heldout.tokens, window=stream.settings.window) if todo else 0.0
    del model
    for method in todo:
        folder = directory / method.name
        result = run_method(
            method,
            stream.load_model(),
            stream.tokenizer,
            stream.tasks,
            stream.heldout,
            stream.settings,
            base_perplexity=before,
            directory=folder,
            progress=listener,
        )
        write_whole(folder / _RESULT, result.model_dump_json(indent=2))
        finished[method.name] = result

    settings = asdict(stream.settings)
    seed = settings.pop("seed")
    results = RunResults(
        title=stream.title,
        created=time.strftime("%Y-%m-%d %H:%M"),
        base_model=stream.base_model,
        base_parameters=parameters,
        heldout=f"{stream.heldout.name} ({len(stream.heldout.tokens):,} tokens)",
        seed=seed,
        settings={**settings, **stream.notes},
        environment=environment(),
        tasks=[_describe(task) for task in stream.tasks],
        methods=[result for result in finished.values() if result is not None],
    )
    results.save(directory / "results.json")
    return results


_RESULT = "result.json"


def _finished(folder: Path) -> MethodResult | None:
    path = folder / _RESULT
    if not path.exists():
        return None
    try:
        return MethodResult.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RunDirectoryError(
            f"{path} does not hold the result of a method, or of another version of this program. Remove the folder "
            f"{folder} to run that method again. ({error.errors()[0]['msg']})"
        ) from error


def _describe(task: Task) -> TaskInfo:
    return TaskInfo(
        name=task.name,
        description=task.description,
        labels=list(task.labels),
        train_examples=len(task.train),
        evaluation_examples=len(task.evaluation),
        majority_rate=task.majority_rate,
    )
