"""The folder of a training: whose it is, one at a time, and what a training that was cut off goes on from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from curlora.continual.storage import is_disk_full, mark_complete, newest, write_whole
from curlora.train.errors import TrainError

__all__ = ["Folder", "claim"]

_RECORD = "training.json"
_LOCK = ".lock"
_CHECKPOINT = "checkpoint-"
_SECONDS = "seconds"


class Folder:
    """Where a training writes.

    ``training.json`` says from the beginning whose the folder is, and is complete when everything else is there.

    Args:
        path: the folder.
        identity: options, and digests of data, that decide which adapter comes out.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, which is gone when all is done."""
        return self.path / "checkpoints"

    def record(self) -> dict[str, Any] | None:
        """What ``training.json`` holds; ``None`` where nothing has been trained, or by this training begun.

        Raises:
            TrainError: if the folder is of another training, or of something else.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
            before = found["identity"]
        except NotADirectoryError:
            raise TrainError(f"--out {self.path} is a file: choose another name for the folder.") from None
        except FileNotFoundError:
            if self.path.exists() and any(path.name != _LOCK for path in self.path.iterdir()):
                raise TrainError(f"--out {self.path} holds files, but no training: choose another folder.") from None
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.path / _RECORD} cannot be read, so whose {self.path} is cannot be told: choose another folder."
            ) from error
        changed = [
            f"{name} is {self.identity.get(name)!r} and was {before.get(name)!r}"
            for name in dict.fromkeys([*before, *self.identity])
            if before.get(name) != self.identity.get(name)
        ]
        if changed and "outcome" not in found and not any(self.checkpoints.glob(f"{_CHECKPOINT}*")):
            return None  # nothing has been done by the other training
        if changed:
            raise TrainError(
                f"--out {self.path} is of another training: {', '.join(changed)}. Choose another folder, or give the "
                "options and data that it was begun with."
            )
        return found

    def write(self, record: Mapping[str, Any]) -> None:
        """Write ``training.json``."""
        content = {"identity": self.identity, **record}
        write_whole(self.path / _RECORD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def checkpoint(self, steps: int) -> Path | None:
        """The newest complete checkpoint before the end; what was cut off while it was written is removed.

        The one at the end holds what the budget's measurement has let stand, and not how much that was: what follows
        the one before is done again.

        Args:
            steps: of the whole training.
        """
        shutil.rmtree(self.checkpoints / f"{_CHECKPOINT}{steps}", ignore_errors=True)
        found = newest(self.checkpoints, _CHECKPOINT)
        for path in self.checkpoints.glob(f"{_CHECKPOINT}*"):
            if path != found:
                shutil.rmtree(path, ignore_errors=True)
        return found

    def mark_checkpoint(self, step: int, seconds: float) -> None:
        """Say that a checkpoint has all its files, and how long training has taken until then."""
        folder = self.checkpoints / f"{_CHECKPOINT}{step}"
        (folder / _SECONDS).write_text(str(seconds), encoding="utf-8")
        mark_complete(folder)

    @staticmethod
    def seconds(checkpoint: Path | None) -> float:
        """How long training had taken at a checkpoint."""
        return 0.0 if checkpoint is None else float((checkpoint / _SECONDS).read_text(encoding="utf-8"))

    def remove_checkpoints(self) -> None:
        """They are of no more use."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


@contextlib.contextmanager
def claim(folder: Folder) -> Iterator[None]:
    """One training at a time in a folder, which is made if it is not there.

    Raises:
        TrainError: if another one is at work in it, or it cannot be made; on a full disk, also later.
    """
    path = folder.path
    lock = filelock.FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
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
        raise TrainError(
            f"The disk that holds {path} is full. Nothing that was finished is lost: free some space, and the same "
            "command goes on."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
