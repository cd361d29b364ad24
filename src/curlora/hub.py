"""Where a model is to be found: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

__all__ = ["no_such_folder"]


def no_such_folder(name: str, folder: Path | None = None) -> str | None:
    """What to say of the name of a model that is neither a folder nor could be one of the hub's.

    transformers asks the hub for whatever is no folder, and reports that a path is no id.

    Args:
        name: as it was given.
        folder: what a relative name is relative to; the working directory if ``None``.
    """
    path = (folder or Path()) / Path(name).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        return f"{path} is a file, where the folder of a model is expected"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"there is no folder {path}"
    return None
