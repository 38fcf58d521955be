"""The user's cache folder, for downloads and compiled code."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The platform's cache folder for sid_fast, which may not exist yet.

    GPU container images often lack platformdirs; without it, follows the XDG rule for Linux.
    """
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        base = os.environ.get("XDG_CACHE_HOME", "").strip()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sid_fast"
    return Path(user_cache_dir("sid_fast"))
