"""Where what is downloaded or computed once is kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``CURLORA_CACHE_DIR``, or the user's cache directory."""
    chosen = os.environ.get("CURLORA_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("curlora"))
