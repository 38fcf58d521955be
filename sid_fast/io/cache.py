"""The user's cache folder: downloads and compiled code."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder that the platform keeps for our cache, which may not exist yet.

    GPU images often lack platformdirs; without it this is its answer on Linux.
    """
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        base = os.environ.get("XDG_CACHE_HOME", "").strip()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sid_fast"
    return Path(user_cache_dir("sid_fast"))
