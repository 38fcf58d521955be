"""The user's cache folder, for downloads and compiled code."""

import os
from pathlib import Path

from sid_fast.errors import UserError


def user_cache() -> Path:
    """Return $SID_FAST_CACHE, or the platform's cache folder for sid_fast; it may not exist yet.

    GPU container images often lack platformdirs; without it, follows the XDG rule for Linux.

    Raises:
        UserError: There is no home folder, or not that of the user that a `~` names.
    """
    chosen = os.environ.get("SID_FAST_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else _platform_cache()
    except RuntimeError as error:
        raise UserError(
            f"the cache folder {chosen or '~/.cache'} is not known ({error}): set SID_FAST_CACHE "
            "to a folder you can write to"
        ) from error


def _platform_cache() -> Path:
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        base = os.environ.get("XDG_CACHE_HOME", "").strip()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sid_fast"
    return Path(user_cache_dir("sid_fast"))
