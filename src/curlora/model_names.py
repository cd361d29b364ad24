"""Names of models: folders, and ids of the hub."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_folder_name", "missing_folder"]


def is_folder_name(name: str) -> bool:
    """Whether a name can only be a folder's: an id of the hub has at most one slash."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def missing_folder(name: str) -> bool:
    """Whether a name can only be a folder's, and there is none: transformers would call it a bad id of the hub."""
    return is_folder_name(name) and not Path(name).expanduser().is_dir()
