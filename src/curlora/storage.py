"""Files and folders that are written atomically, also if the power fails; folders that are locked."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

__all__ = [
    "LOCK",
    "Checkpoints",
    "disk_full",
    "is_disk_full",
    "locked",
    "mark_complete",
    "newest",
    "put_folder",
    "sync",
    "write_whole",
]

LOCK = ".lock"
"""The name of the lock's file, in the folder that it locks."""

_CHECKPOINT = "checkpoint-"
_COMPLETE = "complete"
_SECONDS = "seconds"


def is_disk_full(error: Exception) -> bool:
    """Whether an error means that the disk is full; safetensors and torch raise their own errors for it."""
    return "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path) -> str:
    """Return the message for a disk that becomes full in the middle of work that can be resumed."""
    return (
        f"The disk that holds {folder} is full. Finished work is not lost: free some space, and run the same command "
        "again to resume."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing, and lock it for this process.

    Raises:
        filelock.Timeout: if another process holds the lock.
        OSError: if the folder cannot be written to.
    """
    lock = filelock.FileLock(folder / LOCK)
    folder.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=0)
    try:
        yield
    finally:
        # A process that waits for the removed file notices that, and waits for its successor (filelock 3.21 and later).
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: it appears complete or not at all. Text is encoded as UTF-8."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_entry(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def put_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that appears complete or not at all.

    Args:
        final: the folder. An existing one is replaced; for a moment neither exists.
        fill: writes the files into the folder that it is called with.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        mark_complete(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_entry(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flush every file in a folder from the system's cache to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_entry(folder)


def mark_complete(folder: Path) -> None:
    """Flush a folder's files to the disk and then mark the folder as complete."""
    sync(folder)
    (folder / _COMPLETE).touch()
    _sync_entry(folder)


def newest(parent: Path, prefix: str) -> Path | None:
    """Return the complete folder ``<prefix><number>`` with the highest number, or ``None``."""
    folders = [path for path in parent.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    complete = [path for path in folders if (path / _COMPLETE).exists()]
    return max(complete, key=lambda path: int(path.name.removeprefix(prefix)), default=None)


class Checkpoints:
    """The checkpoints of a training, each with the seconds that the training had taken up to it.

    Args:
        folder: the folder of the checkpoints, which the Trainer names by their steps.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Path]:
        """Return all checkpoints, complete or not."""
        return list(self.folder.glob(f"{_CHECKPOINT}*"))

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or ``None``."""
        return newest(self.folder, _CHECKPOINT)

    def of(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.folder / f"{_CHECKPOINT}{step}"

    def complete(self, step: int, seconds: float) -> Path:
        """Mark the checkpoint of a step as complete, and store its seconds."""
        checkpoint = self.of(step)
        (checkpoint / _SECONDS).write_text(str(seconds), encoding="utf-8")
        mark_complete(checkpoint)
        return checkpoint

    @staticmethod
    def seconds(checkpoint: Path | None) -> float:
        """Return the seconds that the training had taken up to a checkpoint; 0 without one."""
        return 0.0 if checkpoint is None else float((checkpoint / _SECONDS).read_text(encoding="utf-8"))

    def keep_only(self, kept: Path | None) -> None:
        """Remove all other checkpoints."""
        for path in self.all():
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
