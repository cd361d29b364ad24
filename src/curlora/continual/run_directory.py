"""The directory of a run: its lock, and its disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from accelerate.utils import broadcast_object_list

from curlora.continual.errors import RunError
from curlora.continual.processes import process_state
from curlora.storage import disk_full, is_disk_full, locked

__all__ = ["in_use"]


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
