"""Check whether a model's name is a folder, or can be a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

__all__ = ["no_such_folder"]


def no_such_folder(name: str, folder: Path | None = None) -> str | None:
    """Return what is wrong with a model's name that is neither a folder nor a possible hub id.

    transformers looks up everything that is not a folder on the hub, and then only reports that a path is not a valid
    id.

    Args:
        name: the name as it was given.
        folder: the folder to which a relative name is relative; the working directory if ``None``.

    Returns:
        A phrase for an error message, or ``None`` if the name is a folder or can be a hub id.
    """
    path = (folder or Path()) / Path(name).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        return f"{path} is a file, but a model's folder is expected"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"there is no folder {path}"
    return None
