"""A whole run: every method with every seed over one stream, in one directory, from which it can be resumed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from curlora.continual.base_model import Base, measured_base, same_model
from curlora.continual.checks import Adapted
from curlora.continual.encoding import Encoded, encode, in_order
from curlora.continual.errors import RecipeWarning, RunError
from curlora.continual.heldout import HeldOut
from curlora.continual.method_run import BaseScores, MethodRun, work_of
from curlora.continual.methods import Method
from curlora.continual.processes import check_shared_out, process_state
from curlora.continual.results import MethodResult, RunResults, SeedResult, TaskInfo, environment, name_of
from curlora.continual.run_directory import in_use
from curlora.continual.state import State
from curlora.continual.stream import Stream
from curlora.continual.tasks import ClassificationTask
from curlora.storage import write_whole
from curlora.text.progress import NullProgress, Progress

__all__ = ["Finished", "Job", "Runner", "encoded_and_checked", "jobs_of", "run_job", "run_stream"]


@dataclass(frozen=True)
class Job:
    """The unit of work of a run: one method with one seed in one order of the tasks.

    Args:
        method: the method.
        seed: the seed.
        order: names of the tasks in order; empty for the stream's own order.
        folder: the job's folder in the run directory.
    """

    method: Method
    seed: int
    order: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return name_of(self.method.name, self.seed, self.order)


def jobs_of(stream: Stream, directory: Path) -> list[Job]:
    """Return all jobs of a run, in order."""
    return [
        Job(method, seed, tuple(order), directory / method.name / (f"seed-{seed}" + (f"-order-{n}" if n else "")))
        for method in stream.methods
        for n, order in enumerate(((), *stream.orders))
        for seed in stream.seeds
    ]


Runner = Callable[[Sequence[Job], "Base", Progress], Iterator[tuple[Job, "Finished"]]]
"""Runs jobs in this or other processes, and yields each with its record when it is finished, in any order."""


def run_stream(
    stream: Stream,
    directory: Path | str,
    progress: Callable[[float], Progress] = lambda _: NullProgress(),
    begin: Callable[[], None] = lambda: None,
    runner: Runner | None = None,
) -> RunResults:
    """Run every method and seed whose result is not in ``directory`` yet.

    A finished method and seed is never run again; an interrupted one resumes from its last task or checkpoint. Under
    ``accelerate launch`` or ``torchrun`` all processes call this together, and one of them writes the files.

    Args:
        stream: what to run.
        directory: the run directory; created if missing.
        progress: called with the total amount of work; returns the object that is told of the progress.
        begin: called by the first process after it has locked the directory, before anything is written.
        runner: runs the jobs; if ``None``, they run one after another in this process.

    Returns:
        The measurements, also saved in ``directory / "results.json"``, which is rewritten whenever a method and seed is
        finished.

    Raises:
        RunError: if a text is longer than the model has positions, a method cannot be applied to the model, another
            process uses ``directory``, a result in it cannot be read, the disk is full, or the batch size is not a
            multiple of the number of processes.
        curlora.continual.tasks.TaskError: if an example has no token to learn or score.
    """
    directory = Path(directory)
    encoded, adapted = encoded_and_checked(stream)
    with in_use(directory, begin):
        stream = stream.with_answers(directory).keeping_frozen_layers(adapted, directory)
        return _run(stream, encoded, directory, progress, runner)


def encoded_and_checked(stream: Stream) -> tuple[list[Encoded], dict[str, Adapted]]:
    """Encode a stream's tasks, and check everything that can be checked without the model's weights.

    Returns:
        The encoded tasks, and by method what it adapts; see :meth:`Stream.checked`.

    Raises:
        RunError: see :func:`run_stream`.
        curlora.continual.tasks.TaskError: if an example has no token to learn or score.
    """
    encoded = encode(stream.tasks, stream.tokenizer, stream.settings)
    for part in encoded:
        check_shared_out(part.settings.batch_size)
    return encoded, stream.checked(encoded)


def _run(
    stream: Stream,
    encoded: list[Encoded],
    directory: Path,
    progress: Callable[[float], Progress],
    runner: Runner | None,
) -> RunResults:
    jobs = jobs_of(stream, directory)
    finished = {job.folder: _finished(job.folder) for job in jobs}
    todo = [job for job in jobs if finished[job.folder] is None]
    if process_state().is_main_process:
        for job in jobs:
            if job not in todo:  # the run may have been interrupted before this
                State(job.folder).forget()
    in_orders = {order: in_order(encoded, order) for order in {job.order for job in todo}}
    listener = progress(sum(work_of(job.method, in_orders[job.order], stream.texts) for job in todo))

    listener.stage("Base model")
    base = measured_base(stream, encoded, directory)
    here = ((job, run_job(job, stream, in_orders[job.order], base, directory, listener)) for job in todo)
    results = None
    for job, record in here if runner is None else runner(todo, base, listener):
        finished[job.folder] = record
        _warn_of_lost_tasks(job, in_orders[job.order], record.result)
        results = _save_results(stream, encoded, jobs, directory, base, finished)  # can be read during a long run
    return results or _save_results(stream, encoded, jobs, directory, base, finished)


def _warn_of_lost_tasks(job: Job, encoded: Sequence[Encoded], result: SeedResult) -> None:
    """Warn of tasks whose training a limit on forgetting has taken back as a whole.

    The run's own process warns, because nobody reads the output of workers.
    """
    limited = zip(encoded, result.guarded, strict=bool(result.guarded))  # without a limit there are no records
    lost = [part.task.name for part, kept in limited if not kept.scale]
    if lost and process_state().is_main_process:
        warnings.warn(
            f"{job}: no part of the change by {', '.join(map(repr, lost))} keeps the limit on the guard's text, so all "
            "of it was taken back. Allow more forgetting, or lower the learning rate.",
            RecipeWarning,
            stacklevel=2,
        )


def _save_results(
    stream: Stream,
    encoded: Sequence[Encoded],
    jobs: Sequence[Job],
    directory: Path,
    base: Base,
    finished: Mapping[Path, Finished | None],
) -> RunResults:
    """Save and return the results of the jobs that are finished."""
    done = {method.name: [finished[job.folder] for job in jobs if job.method is method] for method in stream.methods}
    results = RunResults(
        title=stream.title,
        created=time.strftime("%Y-%m-%d %H:%M"),
        base_model=stream.base_model,
        base_parameters=base.parameters,
        heldout={text.name: text.describe() for text in stream.texts},
        shown=[text.name for text in stream.texts if text.shown],
        limits=dict(stream.limits),
        missing=[str(job) for job in jobs if finished[job.folder] is None],
        protocol=dict(stream.protocol),
        settings=stream.settings.model_dump(),
        recipe=stream.recipe,
        environment={**environment(), "processes": str(process_state().num_processes)},
        tasks=[_describe(part) for part in encoded],
        methods=[_gather(method, done[method.name]) for method in stream.methods if any(done[method.name])],
    )
    if process_state().is_main_process:
        results.save(directory / "results.json")
    process_state().wait_for_everyone()
    return results


def run_job(
    job: Job, stream: Stream, encoded: Sequence[Encoded], base: Base, directory: Path, listener: Progress
) -> Finished:
    """Run or resume one job, and save its record.

    Args:
        job: a job from :func:`jobs_of`.
        stream: the stream that it belongs to.
        encoded: the stream's tasks in the job's order.
        base: the base model's scores.
        directory: the run directory.
        listener: is told of the progress.
    """
    # The base model was scored on all tasks or on none.
    known = dict(zip((task.name for task in stream.tasks), base.tasks, strict=False))
    result, trainable, size = MethodRun(
        job.method,
        lambda: same_model(stream.load_model(), base.model, directory),
        stream.tokenizer,
        encoded,
        stream.texts,
        seed=job.seed,
        base=BaseScores(base.heldout, [known[part.task.name] for part in encoded if part.task.name in known]),
        directory=job.folder,
        progress=listener,
        guard_text=stream.guard_text if isinstance(stream.guard_text, HeldOut) else None,
        order=job.order,
    ).run()
    record = Finished(result=result, trainable_parameters=trainable, adapter_bytes=size)
    if process_state().is_main_process:
        write_whole(job.folder / _RESULT, record.model_dump_json(indent=2))
        State(job.folder).forget()
    return record


_RESULT = "result.json"


class Finished(BaseModel):
    """The record of a method that has finished the whole stream with one seed."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    result: SeedResult
    trainable_parameters: int
    adapter_bytes: int


def _finished(folder: Path) -> Finished | None:
    path = folder / _RESULT
    if not path.exists():
        return None
    try:
        return Finished.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} does not hold a valid result of a method, or comes from another version of curlora. Remove the "
            f"folder {path.parent} to run that method and seed again."
        ) from error


def _gather(method: Method, finished: Sequence[Finished | None]) -> MethodResult:
    records = [record for record in finished if record is not None]
    return MethodResult(
        name=method.name,
        label=method.label,
        method=method.kind,
        options=method.describe(),
        plugins=[make().describe() for make in method.plugins],
        learning_rate=method.learning_rate,
        trainable_parameters=records[0].trainable_parameters,
        adapter_bytes=records[0].adapter_bytes,
        seeds=[record.result for record in records],
        training=method.training,
        grid=method.grid,
    )


def _describe(part: Encoded) -> TaskInfo:
    task = part.task
    return TaskInfo(
        name=task.name,
        kind=task.kind,
        metric=task.metric,
        description=task.description,
        labels=list(task.labels) if isinstance(task, ClassificationTask) else [],
        train_examples=len(task.train),
        evaluation_examples=len(task.evaluation),
        majority_rate=task.majority_rate,
        evaluation_in_train=task.evaluation_in_train,
        **part.too_long,
    )
