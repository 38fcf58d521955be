"""Files that are either the old version or the whole new one, never half of it."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sid_fast.errors import UserError, WriteFailed

# It can only be read by setting it.
os.umask(_UMASK := os.umask(0))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block succeeds.

    The block writes one file there. If it raises, the temporary file is removed and whatever
    stood at `path` is left untouched. Parent folders are not created.

    Raises UserError if `path` is a folder, WriteFailed if its folder is missing or writing fails.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of a file")
    if not target.parent.is_dir():
        raise WriteFailed(f"{target} cannot be written: create the folder {target.parent} first")
    # Random rather than the process id: ranks on several nodes may share one file system.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write for the owner alone
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)  # makes the new name itself survive a power cut
    except OSError as error:
        raise WriteFailed(
            f"{target} cannot be written ({error.strerror or error}): "
            "check the permissions and the free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk take a file, or the names in a folder, before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_target(target: str, folder: bool = False) -> None:
    """Make the folder that `target` is or lies in; UserError if it cannot be written there."""
    place = Path(target) if folder else Path(target).parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror})") from None
    if not folder and Path(target).is_dir():
        raise UserError(f"{target} is a folder: give the name of a file")
