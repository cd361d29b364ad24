"""Files and folders that are written atomically, also if the power fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["is_disk_full", "mark_complete", "newest", "put_folder", "sync", "write_whole"]

_COMPLETE = "complete"


def is_disk_full(error: Exception) -> bool:
    """Whether an error means that the disk is full; safetensors and torch raise their own errors for it."""
    return "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: it appears complete or not at all."""
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


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
