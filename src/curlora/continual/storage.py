"""Files that appear whole or not at all, also when the power goes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["is_disk_full", "mark_complete", "newest", "put_folder", "sync", "write_whole"]

_COMPLETE = "complete"


def is_disk_full(error: Exception) -> bool:
    """Whether an error is of a full disk; safetensors and torch have errors of their own for that."""
    return "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_entry(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def put_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that appears whole or not at all.

    Args:
        final: the folder; one that is there is replaced, and for a moment neither is.
        fill: writes the files into the folder that it is given.
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
    """Bring every file in a folder to the disk, not only to the system's memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_entry(folder)


def mark_complete(folder: Path) -> None:
    """Say that a folder which grew file by file has all of them, once they are on the disk."""
    sync(folder)
    (folder / _COMPLETE).touch()
    _sync_entry(folder)


def newest(parent: Path, prefix: str) -> Path | None:
    """The complete folder ``<prefix><number>`` with the highest number, if there is any."""
    folders = [path for path in parent.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    complete = [path for path in folders if (path / _COMPLETE).exists()]
    return max(complete, key=lambda path: int(path.name.removeprefix(prefix)), default=None)


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
