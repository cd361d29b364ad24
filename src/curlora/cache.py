"""The directory that keeps downloads and computed results for later runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """Return ``$CURLORA_CACHE_DIR`` if it is set, else curlora's folder in the user's cache directory."""
    chosen = os.environ.get("CURLORA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs  # not at the top, where it would slow down every import of curlora

    return Path(platformdirs.user_cache_dir("curlora"))
