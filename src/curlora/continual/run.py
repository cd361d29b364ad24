"""A whole run: every method with every seed over one stream, in one directory, from which it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from accelerate.utils import broadcast_object_list
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedTokenizerBase

from curlora.continual.answers import OwnText, PromptList, kept_answers
from curlora.continual.checks import Adapted, check_stream, check_texts
from curlora.continual.errors import RecipeWarning, RunError
from curlora.continual.frozen_layers import keep_frozen_layers
from curlora.continual.heldout import HeldOut, measure
from curlora.continual.methods import Method
from curlora.continual.processes import check_shared_out, process_state
from curlora.continual.results import (
    MethodResult,
    RunResults,
    Score,
    SeedResult,
    TaskInfo,
    TextScore,
    environment,
    name_of,
)
from curlora.continual.sequence import BaseScores, Encoded, MethodRun, encode, in_order, work_of
from curlora.continual.settings import Settings
from curlora.continual.state import State
from curlora.continual.storage import is_disk_full, write_whole
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import ClassificationTask, Task
from curlora.continual.trainer import TaskTrainer
from curlora.guard.progress import NullProgress, Progress

__all__ = ["Base", "Finished", "Job", "Runner", "Stream", "jobs_of", "measured_base", "run_job", "run_stream"]


@dataclass(frozen=True)
class Stream:
    """A stream of tasks with the methods, texts and settings of a run.

    Args:
        title: title of the report.
        base_model: the model's name in reports.
        load_model: returns a fresh causal language model each time it is called.
        tokenizer: the model's tokenizer.
        tasks: the tasks in order.
        methods: the methods, with distinct names; each starts from a fresh model.
        heldout: texts whose perplexity is measured; summaries show the first.
        settings: how to train and score.
        seeds: each method is run once with each seed.
        protocol: the protocol's switches, for the report.
        recipe: the recipe, for the report.
        sampled: further held-out texts, which the base model must write first.
        guard_text: a general text for plug-ins; the base model may have to write it first. Its perplexity is measured
            too.
        orders: further orders of the tasks, each a list of all their names; every method is run in each.
        limits: limits on forgetting, for the report; see :class:`curlora.continual.recipe.Recipe`.
        load_empty: returns the model on the meta device, with which all methods are checked before any is run. If
            ``None``, an error of a method shows only when the method starts.
    """

    title: str
    base_model: str
    load_model: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    methods: Sequence[Method]
    heldout: Sequence[HeldOut]
    settings: Settings = field(default_factory=Settings)
    seeds: Sequence[int] = (0,)
    protocol: Mapping[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    sampled: Sequence[PromptList | OwnText] = ()
    guard_text: HeldOut | PromptList | OwnText | None = None
    orders: Sequence[Sequence[str]] = ()
    limits: Mapping[str, list[float]] = field(default_factory=dict)
    load_empty: Callable[[], nn.Module] | None = None

    @property
    def texts(self) -> list[HeldOut]:
        """The texts that exist already: the held-out texts, then the guard's."""
        return [*self.heldout, *([self.guard_text] if isinstance(self.guard_text, HeldOut) else [])]

    @property
    def unwritten(self) -> list[PromptList | OwnText]:
        """The texts that the base model must write first; the guard's comes last."""
        guard = self.guard_text
        return [*self.sampled, *([] if guard is None or isinstance(guard, HeldOut) else [guard])]

    def with_answers(self, directory: Path) -> Stream:
        """Return the stream with the base model's texts among its texts.

        Args:
            directory: the run directory, in which they are saved.
        """
        if not self.unwritten:
            return self
        load = functools.cache(lambda: self.load_model().to(process_state().device))
        if process_state().is_main_process:
            for text in self.unwritten:
                kept_answers(text, self.tokenizer, directory, load)
        process_state().wait_for_everyone()
        written: list[HeldOut] = [kept_answers(text, self.tokenizer, directory, load) for text in self.unwritten]
        guard = self.guard_text
        if guard is not None and not isinstance(guard, HeldOut):
            guard = dataclasses.replace(written.pop(), shown=True)
        return dataclasses.replace(self, heldout=[*self.heldout, *written], sampled=(), guard_text=guard)

    def checked(self, encoded: Sequence[Encoded]) -> dict[str, Adapted]:
        """Check the methods on the model without weights; see :func:`curlora.continual.checks.check_stream`.

        Args:
            encoded: the encoded tasks.
        """
        if self.load_empty is None:
            return {}
        keeping = self.settings.cache_frozen_layers
        texts, seed = self.texts, self.seeds[0]
        return check_stream(
            self.methods, texts, encoded, self.load_empty, seed, unwritten=self.unwritten, frozen_layers=keeping
        )

    def keeping_frozen_layers(self, adapted: Mapping[str, Adapted], directory: Path) -> Stream:
        """Return the stream with models that cache the outputs of layers that no method trains, if so configured.

        Args:
            adapted: the result of :meth:`checked`.
            directory: the run directory.

        Raises:
            RunError: if ``adapted`` is empty, so the number of these layers is unknown.
        """
        if not self.settings.cache_frozen_layers:
            return self
        if not adapted:
            raise RunError(
                "cache_frozen_layers needs the model on the meta device. Pass load_empty, a function that returns it."
            )
        below = min(of.below for of in adapted.values())
        load = self.load_model
        return dataclasses.replace(self, load_model=lambda: keep_frozen_layers(load(), below, directory))


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
    directory: Path,
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
    encoded = encode(stream.tasks, stream.tokenizer, stream.settings)
    for part in encoded:
        check_shared_out(part.settings.batch_size)
    adapted = stream.checked(encoded)
    with _locked(directory, begin), _disk_errors(directory):
        stream = stream.with_answers(directory).keeping_frozen_layers(adapted, directory)
        return _run(stream, encoded, directory, progress, runner)


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
        lambda: _same_model(stream.load_model(), base.model, directory),
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


_RESULT, _BASE = "result.json", "base.json"


class Base(BaseModel):
    """The base model's scores, saved so that a resumed run does not measure them again."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    data: str
    model: str
    parameters: int
    heldout: dict[str, TextScore]
    tasks: list[Score]


class Finished(BaseModel):
    """The record of a method that has finished the whole stream with one seed."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    result: SeedResult
    trainable_parameters: int
    adapter_bytes: int


def measured_base(stream: Stream, encoded: Sequence[Encoded], directory: Path) -> Base:
    """Return the base model's scores: read from the run directory, or measured now and saved.

    Raises:
        RunError: if the data differ from those of the run in the directory, or a text is too long for the model.
    """
    path = directory / _BASE
    data = _data_digest(encoded, stream.texts)
    if path.exists():
        try:
            known = Base.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read. Remove it: the base model is then measured again.") from error
        if known.data == data:
            return known
        if any(directory.glob("*/seed-*")):  # else nothing was trained on the other data
            raise RunError(
                f"The data or the tokenizer have changed since the run in {directory} began, so earlier and later "
                "results could not be compared. Choose another folder, or undo the change."
            )
    wanted = [part for part in encoded if part.settings.forward_transfer]
    language_model: Any = stream.load_model().to(process_state().device).requires_grad_(False)
    model = TaskModel(language_model)
    check_texts(language_model.config, stream.texts, encoded)
    scores = []
    for part in wanted:
        model.begin(part.number, part.task.classes)
        trainer = TaskTrainer(model, 0.0, [], stream.tokenizer, part.settings, stream.seeds[0], directory / ".base")
        generated = directory / "generated" / f"{part.task.name}.jsonl"
        scores.append(trainer.score(part.evaluation, part.generation, generated))
    if process_state().is_main_process:
        shutil.rmtree(directory / ".base", ignore_errors=True)  # created by the Trainer and left empty
    base = Base(
        data=data,
        model=_model_digest(language_model),
        parameters=language_model.num_parameters(),  # also correct for packed quantized weights
        heldout={text.name: measure(language_model, text) for text in stream.texts},
        tasks=scores,
    )
    if process_state().is_main_process:
        write_whole(path, base.model_dump_json(indent=2))
    return base


def _data_digest(encoded: Sequence[Encoded], texts: Sequence[HeldOut]) -> str:
    """Return the SHA-256 of all tokens that are trained on, scored or used by plug-ins."""
    digest = hashlib.sha256()
    for part in encoded:
        digest.update(json.dumps([part.task.name, part.train, part.evaluation]).encode())
        if part.generation is not None:
            digest.update(json.dumps([part.generation.prompts.ids, part.generation.prompts.answers]).encode())
    for text in texts:
        digest.update(json.dumps([text.name, text.window, text.stride, text.tokens.tolist()]).encode())
    return digest.hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names and shapes of a model's weights and of at most 16 values of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        few = tensor.flatten()[:: max(1, tensor.numel() // 16)][:16]
        digest.update(json.dumps(few.double().tolist()).encode())
    return digest.hexdigest()


def _same_model(model: nn.Module, digest: str, directory: Path) -> nn.Module:
    if _model_digest(model) != digest:
        raise RunError(
            f"The base model is not the one that the run in {directory} began with. Choose another folder, or use that "
            "model."
        )
    return model


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


@contextlib.contextmanager
def _locked(directory: Path, begin: Callable[[], None]) -> Iterator[None]:
    """Lock a directory for one run; the first process holds the lock for all processes of the run."""
    state = process_state()
    refusal: list[str | None] = [None]
    lock = filelock.FileLock(directory / ".lock")
    if state.is_main_process:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            begin()
        except RunError as error:
            refusal = [str(error)]
        except filelock.Timeout:
            refusal = [f"{directory} is in use by another run. Wait for it, or choose another folder."]
        except OSError as error:
            unusable = f"{directory} cannot be used as a run directory: {error.strerror}. Choose another folder."
            refusal = [_disk_full(directory) if is_disk_full(error) else unusable]
    if state.num_processes > 1:
        broadcast_object_list(refusal)
    try:
        if refusal[0] is not None:
            raise RunError(refusal[0])
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _disk_full(directory: Path) -> str:
    return (
        f"The disk that holds {directory} is full. Finished results are not lost. Free some space and run the same "
        "command again: it resumes the run."
    )


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Raise one clear error if the disk is full; safetensors and torch raise their own errors for it."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) and shutil.disk_usage(directory).free > 1 << 20:
            raise
        raise RunError(_disk_full(directory)) from error
