"""Run a recipe's jobs with Ray: each method, order and seed is a task of Ray, on this machine or on a cluster.

Ray holds no results. A task writes to its folder of the run directory, as in a run in one process. If a worker dies,
Ray restarts the task on another worker, where it resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curlora.continual.base_model import Base, measured_base
from curlora.continual.computing import computing
from curlora.continual.encoding import Encoded, encode, in_order
from curlora.continual.errors import RunError
from curlora.continual.run import Finished, Job, Runner, jobs_of, run_job
from curlora.text.progress import Progress

if TYPE_CHECKING:
    from curlora.continual.recipe import Recipe
    from curlora.continual.stream import Stream

__all__ = ["ray_workers"]

_TRIES = 3  # retries of a task whose worker or machine has died
_LISTEN = 0.5  # seconds between two polls of the workers


@contextlib.contextmanager
def ray_workers(recipe: Recipe, directory: Path, workers: int | None, address: str | None) -> Iterator[Runner]:
    """Context manager that starts or joins Ray, yields a runner of jobs, and disconnects at the end.

    Args:
        recipe: the recipe. Each job gets its ``resources``.
        directory: the run directory, which every machine must see.
        workers: the most jobs at a time; as many as the resources allow if ``None``.
        address: the address of a running cluster; ``None`` for this machine alone.

    Raises:
        RunError: if Ray is not installed, the cluster cannot be reached, or its resources are too small for one job.
    """
    try:
        import ray
    except ImportError as error:
        raise RunError("Workers need Ray, which is not installed: pip install ray") from error
    if workers is not None and workers < 1:
        raise RunError(f"A run needs 1 or more workers, got {workers}.")
    cpus, gpus = recipe.resources.threads(workers=True), recipe.resources.gpus
    options: dict[str, Any] = {"address": address or "local", "logging_level": "error", "log_to_driver": False}
    if address is None:
        # The number of workers that was asked for is used, even if it exceeds the machine's cores.
        of_machine = (workers or max(1, (os.cpu_count() or 1) // cpus)) * cpus
        options |= {"num_cpus": of_machine, "include_dashboard": False}
    try:
        if address is not None and ":" in address:  # Ray itself would retry for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"The Ray cluster at {address or 'this machine'} cannot be used: {error}") from error
    try:
        there = ray.cluster_resources()
        if gpus is None:  # a worker that asks for none would see all of them
            gpus = min(1.0, there.get("GPU", 0))
        if there.get("GPU", 0) < gpus or there.get("CPU", 0) < cpus:
            raise RunError(
                f"The recipe's resources give each method {cpus} CPUs and {gpus:g} GPUs, but Ray has only "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in all. Lower the resources."
            )
        yield functools.partial(_run_on_ray, recipe, directory.absolute(), workers, cpus, gpus)
    finally:
        ray.shutdown()


def _run_on_ray(
    recipe: Recipe,
    directory: Path,
    workers: int | None,
    cpus: int,
    gpus: float,
    jobs: Sequence[Job],
    base: Base,
    listener: Progress,
) -> Iterator[tuple[Job, Finished]]:
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this machine, so that the loss of another one does not take the progress of all jobs with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    heard: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    content = recipe.model_dump_json()
    task = ray.remote(_work).options(num_cpus=cpus, num_gpus=gpus, max_retries=_TRIES)
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    progress = _Combined(listener)
    try:
        while waiting or running:
            while waiting and (workers is None or len(running) < workers):
                job = waiting.pop(0)
                folder = str(job.folder.absolute().relative_to(directory))
                running[task.remote(content, str(directory), folder, cpus, heard)] = job
            done, _ = ray.wait(list(running), timeout=_LISTEN)
            while not heard.empty():
                progress.hear(*heard.get())
            for reference in done:
                yield running.pop(reference), _record(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _record(reference: Any) -> Finished:
    import ray

    try:
        return Finished.model_validate_json(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise cause from error
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.LocalRayletDiedError,
    ) as error:
        raise RunError(
            f"A worker has died {_TRIES + 1} times on the same method. It may need more memory than there is."
        ) from error
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray has lost a method: {error}") from error


def _work(content: str, directory: str, folder: str, cpus: int, heard: Any) -> str:
    """Run the job of a folder in a worker, and return its record as JSON."""
    stream, encoded = _prepared(content, directory)
    job = next(job for job in jobs_of(stream, Path(directory)) if job.folder == Path(directory) / folder)
    speaking = _Speaking(folder, heard)
    with computing(cpus, stream.settings.fp32_products):
        base = measured_base(stream, encoded, Path(directory))
        tasks = in_order(encoded, job.order)
        return run_job(job, stream, tasks, base, Path(directory), speaking).model_dump_json()


@functools.lru_cache(maxsize=1)
def _prepared(content: str, directory: str) -> tuple[Stream, list[Encoded]]:
    """Read a recipe's data, once in each worker."""
    from curlora.continual.launch import build
    from curlora.continual.recipe import Recipe

    stream = build(Recipe.model_validate(json.loads(content)))
    encoded = encode(stream.tasks, stream.tokenizer, stream.settings)
    adapted = stream.checked(encoded) if stream.settings.cache_frozen_layers else {}
    return stream.with_answers(Path(directory)).keeping_frozen_layers(adapted, Path(directory)), encoded


class _Speaking:
    """A progress that is sent to the process that started the run."""

    def __init__(self, folder: str, heard: Any) -> None:
        self.folder, self.heard = folder, heard
        self.heard.put((folder, None, 0.0))  # the job starts, or restarts after its worker died

    def stage(self, text: str) -> None:
        self.heard.put((self.folder, text, 0.0))

    def advance(self, units: float) -> None:
        self.heard.put((self.folder, "", units))


class _Combined:
    """The combined progress of all workers; work that is repeated after a worker died is not counted twice."""

    def __init__(self, listener: Progress) -> None:
        self.listener = listener
        self.done: dict[str, float] = {}
        self.again: dict[str, float] = {}

    def hear(self, folder: str, stage: str | None, units: float) -> None:
        if stage is None:
            self.again[folder] = self.done.get(folder, 0.0)
        elif stage:
            self.listener.stage(stage)
        known = min(units, self.again.get(folder, 0.0))
        self.again[folder] = self.again.get(folder, 0.0) - known
        self.done[folder] = self.done.get(folder, 0.0) + units - known
        if units > known:
            self.listener.advance(units - known)
