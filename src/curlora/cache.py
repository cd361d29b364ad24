"""Where what is downloaded or computed once is kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``CURLORA_CACHE_DIR``, or the user's cache directory."""
    chosen = os.environ.get("CURLORA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs  # not at the top: whoever imports curlora would wait for it

    return Path(platformdirs.user_cache_dir("curlora"))
