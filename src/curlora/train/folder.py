"""The output folder of a training: its owner, its lock, and the checkpoint to resume from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from curlora.storage import LOCK, Checkpoints, disk_full, is_disk_full, locked, write_whole
from curlora.train.errors import TrainError

__all__ = ["RECORD", "Folder", "claim"]

RECORD = "training.json"


class Folder:
    """The folder that a training writes to.

    ``training.json`` names the training that the folder belongs to from the start. It receives the outcome last, when
    all other files are complete.

    Args:
        path: the folder.
        identity: the options, and the digests of the data, that determine the trained adapter.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints, which are removed when the training is finished."""
        return Checkpoints(self.path / "checkpoints")

    def record(self) -> dict[str, Any] | None:
        """Return the content of ``training.json``; ``None`` if no training has left anything in the folder.

        Raises:
            TrainError: if the folder belongs to another training, or holds other files.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            before = found["identity"]
        except NotADirectoryError:
            raise TrainError(f"--out {self.path} is a file, not a folder: choose another name.") from None
        except FileNotFoundError:
            if self.path.exists() and any(path.name != LOCK for path in self.path.iterdir()):
                raise TrainError(f"--out {self.path} holds files, but no training: choose another folder.") from None
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.path / RECORD} cannot be read, so it is unknown which training {self.path} belongs to. Choose "
                "another folder."
            ) from error
        changed = [
            f"{name} is {self.identity.get(name)!r} and was {before.get(name)!r}"
            for name in dict.fromkeys([*before, *self.identity])
            if before.get(name) != self.identity.get(name)
        ]
        if changed and "outcome" not in found and not self.checkpoints.all():
            return None  # the other training has left nothing that could be lost
        if changed:
            raise TrainError(
                f"--out {self.path} belongs to another training: {', '.join(changed)}. Choose another folder, or give "
                "the options and data that the training was started with."
            )
        return found

    def write(self, record: Mapping[str, Any]) -> None:
        """Write ``training.json``."""
        content = {"identity": self.identity, **record}
        write_whole(self.path / RECORD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)


@contextlib.contextmanager
def claim(folder: Folder) -> Iterator[None]:
    """Create the folder if needed, and lock it so that one training at a time writes to it.

    Raises:
        TrainError: if another training holds the lock, if the folder cannot be written to, or if the disk becomes full
            while the lock is held.
    """
    path = folder.path
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except filelock.Timeout:
            raise TrainError(
                f"--out {path} is in use by another training: wait for it, or choose another folder."
            ) from None
        except OSError as error:
            raise TrainError(f"--out {path} cannot be written to: {error.strerror}. Choose another folder.") from error
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise TrainError(disk_full(path)) from error
