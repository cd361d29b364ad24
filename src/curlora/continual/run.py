"""A whole run: every method with every seed over one stream, into one directory that can be gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
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
from curlora.continual.errors import RunError
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
from curlora.continual.sequence import BaseScores, Encoded, MethodRun, Progress, Silent, encode, in_order, work_of
from curlora.continual.settings import Settings
from curlora.continual.state import State
from curlora.continual.storage import is_disk_full, write_whole
from curlora.continual.task_model import TaskModel
from curlora.continual.tasks import ClassificationTask, Task
from curlora.continual.trainer import TaskTrainer

__all__ = ["Base", "Finished", "Job", "Runner", "Stream", "jobs_of", "measured_base", "run_job", "run_stream"]


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
        heldout: texts whose perplexity is followed; the first is the one that summaries show.
        settings: how to train and score.
        seeds: each method is run once with each.
        protocol: further facts for the report: the switches of the protocol.
        recipe: the recipe, for the report.
        sampled: further texts that are held out, which the base model has to write first.
        guard_text: a general text for plug-ins that go by one, which the base model may have to write first; it is
            followed as well.
        orders: further orders of the tasks, each all of their names; every method is run in each.
        limits: on forgetting, for the report: see :class:`curlora.continual.recipe.Recipe`.
        load_empty: gives the model on the meta device, by which the methods are checked before any is run; without it
            each is found out when it begins.
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
        """All that are followed and have been written: those that are held out, then the guard's."""
        return [*self.heldout, *([self.guard_text] if isinstance(self.guard_text, HeldOut) else [])]

    @property
    def unwritten(self) -> list[PromptList | OwnText]:
        """What the base model has to write first, the guard's last."""
        guard = self.guard_text
        return [*self.sampled, *([] if guard is None or isinstance(guard, HeldOut) else [guard])]

    def with_answers(self, directory: Path) -> Stream:
        """The stream with what the base model writes among its texts.

        Args:
            directory: the run directory, which keeps it.
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
        """The methods on the model without weights, see :func:`curlora.continual.checks.check_stream`.

        Args:
            encoded: the tasks.
        """
        if self.load_empty is None:
            return {}
        keeping = self.settings.cache_frozen_layers
        texts, seed = self.texts, self.seeds[0]
        return check_stream(self.methods, texts, encoded, self.load_empty, seed, frozen_layers=keeping)

    def keeping_frozen_layers(self, adapted: Mapping[str, Adapted], directory: Path) -> Stream:
        """The stream with models that keep what the layers below all methods put out, where the settings say so.

        Args:
            adapted: from :meth:`checked`.
            directory: the run directory.

        Raises:
            RunError: if how many layers these are was not found out.
        """
        if not self.settings.cache_frozen_layers:
            return self
        if not adapted:
            raise RunError("cache_frozen_layers goes by the model without weights: say how to get it (load_empty).")
        below = min(of.below for of in adapted.values())
        load = self.load_model
        return dataclasses.replace(self, load_model=lambda: keep_frozen_layers(load(), below, directory))


@dataclass(frozen=True)
class Job:
    """One method with one seed in one order of the tasks: what is run at one go.

    Args:
        method: the method.
        seed: of the run.
        order: names of the tasks; empty for the stream's own order.
        folder: where it is saved, in the run directory.
    """

    method: Method
    seed: int
    order: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return name_of(self.method.name, self.seed, self.order)


def jobs_of(stream: Stream, directory: Path) -> list[Job]:
    """All that there is to run, in order."""
    return [
        Job(method, seed, tuple(order), directory / method.name / (f"seed-{seed}" + (f"-order-{n}" if n else "")))
        for method in stream.methods
        for n, order in enumerate(((), *stream.orders))
        for seed in stream.seeds
    ]


Runner = Callable[[Sequence[Job], "Base", Progress], Iterator[tuple[Job, "Finished"]]]
"""Runs jobs, here or elsewhere, and gives each with its record when it is finished, in any order."""


def run_stream(
    stream: Stream,
    directory: Path,
    progress: Callable[[float], Progress] = lambda _: Silent(),
    begin: Callable[[], None] = lambda: None,
    runner: Runner | None = None,
) -> RunResults:
    """Run every method and seed that ``directory`` does not hold already.

    A finished method and seed is never run again; one that was cut off goes on from its last task or checkpoint.
    Under ``accelerate launch`` or ``torchrun`` all processes call this together, and one of them writes.

    Args:
        stream: what to run.
        directory: the run directory; made if missing.
        progress: given the whole amount of work, gives what hears about it.
        begin: called by the first process once it alone has the directory, before anything is done in it.
        runner: runs the jobs; one after another in this process if ``None``.

    Returns:
        The measurements, also in ``directory / "results.json"``, which is written anew whenever a method and seed is
        finished.

    Raises:
        RunError: if a text is longer than the model has positions, a method cannot be put on the model, another
            process runs in ``directory``, a result in it cannot be read, the disk is full, or the batch size cannot be
            shared out over the processes.
        curlora.continual.tasks.TaskError: if an example becomes nothing that can be learned or scored.
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
            if job not in todo:  # cut off just before this was done
                State(job.folder).forget()
    in_orders = {order: in_order(encoded, order) for order in {job.order for job in todo}}
    listener = progress(sum(work_of(job.method, in_orders[job.order], stream.texts) for job in todo))

    listener.stage("Base model")
    base = measured_base(stream, encoded, directory)
    here = ((job, run_job(job, stream, in_orders[job.order], base, directory, listener)) for job in todo)
    results = None
    for job, record in here if runner is None else runner(todo, base, listener):
        finished[job.folder] = record
        results = _save_results(stream, encoded, jobs, directory, base, finished)  # a long run is looked at meanwhile
    return results or _save_results(stream, encoded, jobs, directory, base, finished)


def _save_results(
    stream: Stream,
    encoded: Sequence[Encoded],
    jobs: Sequence[Job],
    directory: Path,
    base: Base,
    finished: Mapping[Path, Finished | None],
) -> RunResults:
    """Of what has been finished so far."""
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
    """Run one job, or go on with it, and save its record.

    Args:
        job: of :func:`jobs_of`.
        stream: what it belongs to.
        encoded: the stream's tasks in the job's order.
        base: what is known of the base model.
        directory: the run directory.
        listener: hears of the progress.
    """
    # Measured of all tasks or of none.
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
    """What is known of the base model, so that going on does not measure it again."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    data: str
    model: str
    parameters: int
    heldout: dict[str, TextScore]
    tasks: list[Score]


class Finished(BaseModel):
    """A method that went through the whole stream with one seed."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    result: SeedResult
    trainable_parameters: int
    adapter_bytes: int


def measured_base(stream: Stream, encoded: Sequence[Encoded], directory: Path) -> Base:
    """What is known of the base model, from the run directory or measured now.

    Raises:
        RunError: if the data are others than in the run that the directory holds, or a text is too long for the model.
    """
    path = directory / _BASE
    data = _data_digest(encoded, stream.texts)
    if path.exists():
        try:
            known = Base.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read. Remove it, and the base model is measured again.") from error
        if known.data == data:
            return known
        if any(directory.glob("*/seed-*")):  # else nothing was done with other data
            raise RunError(
                f"The data or the tokenizer have changed since the run in {directory} began, so what it measured "
                "cannot be compared with what comes. Choose another folder, or undo the change."
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
        shutil.rmtree(directory / ".base", ignore_errors=True)  # the Trainer makes one, and nothing comes into it
    base = Base(
        data=data,
        model=_model_digest(language_model),
        parameters=language_model.num_parameters(),  # also right for weights that are packed
        heldout={text.name: measure(language_model, text) for text in stream.texts},
        tasks=scores,
    )
    if process_state().is_main_process:
        write_whole(path, base.model_dump_json(indent=2))
    return base


def _data_digest(encoded: Sequence[Encoded], texts: Sequence[HeldOut]) -> str:
    """Of everything that is trained on, scored or gone by, as tokens."""
    digest = hashlib.sha256()
    for part in encoded:
        digest.update(json.dumps([part.task.name, part.train, part.evaluation]).encode())
        if part.generation is not None:
            digest.update(json.dumps([part.generation.prompts.ids, part.generation.prompts.answers]).encode())
    for text in texts:
        digest.update(json.dumps([text.name, text.window, text.stride, text.tokens.tolist()]).encode())
    return digest.hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Of names and shapes of a model's weights, and of a few numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        few = tensor.flatten()[:: max(1, tensor.numel() // 16)][:16]
        digest.update(json.dumps(few.double().tolist()).encode())
    return digest.hexdigest()


def _same_model(model: nn.Module, digest: str, directory: Path) -> nn.Module:
    if _model_digest(model) != digest:
        raise RunError(
            f"The base model is not the one that the run in {directory} began with. Choose another folder, or take "
            "that model."
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
            f"{path} does not hold the result of a method, or of another version of this program. Remove the folder "
            f"{path.parent} to run that method again."
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
    """One run at a time in a directory; the first process holds the lock for all of its own."""
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
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _disk_full(directory: Path) -> str:
    return (
        f"The disk that holds {directory} is full. Nothing that was finished is lost: free some space, and the same "
        "command goes on."
    )


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Say it plainly when the disk is full; safetensors and torch have errors of their own for that."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) and shutil.disk_usage(directory).free > 1 << 20:
            raise
        raise RunError(_disk_full(directory)) from error
