"""Atomic writes: a file is either the old version or the complete new one."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import secrets
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sid_fast.errors import UserError, WriteFailed

# The umask can only be read by setting it.
os.umask(_UMASK := os.umask(0))

TEMPORARY = re.compile(r"(.+)\.([0-9a-f]{8})\.tmp")  # names of temporary files; group 1: the target
_ABANDONED_SECONDS = 3600  # after which another machine's temporary file counts as abandoned
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # SIGINT raises KeyboardInterrupt
_unfinished: set[Path] = set()  # temporary files of this process


def temporary_name(path: Path) -> Path:
    """Return a new temporary name for `path`, in the same folder.

    It begins with a tag of this boot of the machine and is random otherwise: process ids of ranks
    on several nodes can coincide on a shared file system.
    """
    return path.with_name(f"{path.name}.{_boot_tag()}{secrets.token_hex(2)}.tmp")


@functools.cache
def _boot_tag() -> str:
    return hashlib.sha256((boot_id() or socket.gethostname()).encode()).hexdigest()[:4]


def boot_id() -> str:
    """Return the kernel's id of this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@contextmanager
def _held(target: Path) -> Iterator[Path]:
    """Create a temporary file for `target` and lock it through the block."""
    while True:
        temporary = temporary_name(target)
        try:
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # someone else's
            continue
        with contextlib.suppress(OSError):  # no flock on this file system
            fcntl.flock(file, fcntl.LOCK_SH)
        if _is_file(file, temporary):
            break
        os.close(file)  # removed before it was locked
    try:
        yield temporary
    finally:
        os.close(file)


def _is_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def remove_abandoned(folder: Path, targets: str = ".+") -> None:
    """Remove temporary files of killed processes.

    Of this boot of the machine those that nobody writes (see _held), of others those of over an
    hour ago.

    Args:
        folder: Where the files are.
        targets: Regular expression of the names of the files that were to be written.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = TEMPORARY.fullmatch(entry.name)
            if name and re.fullmatch(targets, name[1]) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_abandoned(Path(entry.path), name[2].startswith(_boot_tag()))


def _remove_abandoned(path: Path, here: bool) -> None:
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it is being written
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            age = os.fstat(probe.fileno()).st_mtime - os.fstat(file).st_mtime
        if here or age > _ABANDONED_SECONDS:
            path.unlink()
    finally:
        os.close(file)


@contextmanager
def _removed_on_signals(temporary: Path) -> Iterator[None]:
    """Remove `temporary` at the end of the block, even if a signal kills the process in it."""

    def die(number: int, frame: object) -> None:
        for path in list(_unfinished):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    first = not _unfinished and threading.current_thread() is threading.main_thread()
    _unfinished.add(temporary)
    handled = [s for s in _SIGNALS if first and signal.getsignal(s) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, die)
    try:
        yield
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` when the block succeeds.

    The block writes one file there. If it raises, or SIGTERM or SIGHUP kills the process, the
    temporary file is removed and the old `path` is untouched. A link stays, and the file it points
    to is replaced. Parent folders are not created.

    Raises:
        UserError: `path` is a folder, device, pipe or socket.
        WriteFailed: its folder is missing, or writing fails.
    """
    target = replaceable(path)
    if not target.parent.is_dir():
        raise WriteFailed(f"{target} cannot be written: create the folder {target.parent} first")
    try:
        with _held(target) as temporary, _removed_on_signals(temporary):
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


def open_target(target: str, folder: bool = False, files: str = "") -> None:
    """Create the folder of an output and check that it is writable, before any work is done.

    Removes what killed processes left of earlier such outputs: see remove_abandoned.

    Args:
        target: path of the output.
        folder: `target` is itself the folder, not a file.
        files: regular expression of the names of the files in such a folder.

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
    names = files if folder else re.escape(os.path.basename(os.path.realpath(target)))
    remove_abandoned(directory, names)
