"""Atomic writes: a file is either the old version or the complete new one."""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sid_fast.errors import UserError, WriteFailed

# The umask can only be read by setting it.
os.umask(_UMASK := os.umask(0))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` when the block succeeds.

    The block writes one file there. If it raises, the temporary file is removed and the old `path`
    is untouched. A link stays, and the file it points to is replaced. Parent folders are not
    created.

    Raises:
        UserError: `path` is a folder, device, pipe or socket.
        WriteFailed: its folder is missing, or writing fails.
    """
    target = replaceable(path)
    if not target.parent.is_dir():
        raise WriteFailed(f"{target} cannot be written: create the folder {target.parent} first")
    # Random, since process ids of ranks on several nodes can coincide on a shared file system.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write with mode 600
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)  # the rename survives a power cut
    except OSError as error:
        raise WriteFailed(
            f"{target} cannot be written ({error.strerror or error}): "
            "check the permissions and the free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def replaceable(path: str | os.PathLike[str]) -> Path:
    """Follow links to the file that a write to `path` replaces, which may not exist yet.

    Raises:
        UserError: it is a folder, device, pipe or socket.
        WriteFailed: it cannot be looked up, as where links form a circle.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise WriteFailed(f"{path} cannot be written ({error.strerror}): check the path") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: give the name of a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a device, pipe or socket: give the name of a file")
    return Path(os.path.realpath(path))


def flush(path: Path) -> None:
    """Call fsync on a file, or on a folder to make its directory entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_target(target: str, folder: bool = False) -> None:
    """Create the folder of an output and check that it is writable, before any work is done.

    Args:
        target: path of the output.
        folder: `target` is itself the folder, not a file.

    Raises:
        UserError: the folder cannot be created or written, or `target` should be a file but is a
            folder, device, pipe or socket.
    """
    directory = Path(target) if folder else replaceable(target).parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}): give a path you can write to"
        ) from None
