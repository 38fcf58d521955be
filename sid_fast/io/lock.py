"""A lock on a run folder: flock, and a lease file for file systems where flock does not work."""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path

from sid_fast.errors import UserError
from sid_fast.io.atomic import boot_id
from sid_fast.io.untrusted import parse_json

NAME = "run.lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # without a heartbeat, after which a holder on another host counts as dead
RESTART_SECONDS = 30.0  # how long a restarted run waits for its own former process to end
_LEASE_BYTES = 1024  # padded to this length, so that a heartbeat overwrites it in place


@dataclasses.dataclass
class Lease:
    """The holder of a lock, as JSON in the lock file."""

    host: str
    boot: str  # the kernel's boot id
    pid: int
    started: int  # start of the process, in clock ticks since boot; 0 if unknown
    launch: str  # torchrun's run id, or empty
    restart: int  # torchrun's restart count
    flocked: bool  # whether the holder has the flock
    inode: int  # of the lock file: a copied folder is not locked
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Keeps other processes from writing to a run folder.

    A process that dies loses its flock at once. Where flock is not supported, or does not reach
    across hosts, the lease decides: on the same host by process id and start time, on another one
    by its heartbeat.

    Args:
        folder: The run folder.
        launch: torchrun's run id, or empty.
        restart: torchrun's restart count; a restarted run takes over its own lock.

    Raises:
        UserError: Another process uses the folder; names it.
    """

    def __init__(self, folder: Path, launch: str = "", restart: int = 0):
        self.folder, self.path = folder, folder / NAME
        self.lost = False  # another process has taken the lease
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flocked = self._flock(launch, restart)
            other = _read(self._file)
            if other and not self._may_take(other, flocked, launch, restart):
                raise UserError(self._refusal(other))
        except BaseException:
            os.close(self._file)
            raise
        self.lease = Lease(
            host=socket.gethostname(),
            boot=boot_id(),
            pid=os.getpid(),
            started=_process_start(os.getpid()),
            launch=launch,
            restart=restart,
            flocked=flocked,
            inode=os.fstat(self._file).st_ino,
            token=secrets.token_hex(8),
        )
        self._write()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        # A forked child that outlives this process would keep the flock.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock; the empty lock file stays, since removing it would be a race."""
        self._stop.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _flock(self, launch: str, restart: int) -> bool:
        """Take the flock; return False where the file system does not support it."""
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                other = _read(self._file)
                own = other and _is_restart(other, launch, restart)
                if not own or time.monotonic() > deadline:
                    raise UserError(self._refusal(other)) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _may_take(self, other: Lease, flocked: bool, launch: str, restart: int) -> bool:
        """Whether the holder of a lease is gone, or is this run before torchrun restarted it."""
        if other.inode != os.fstat(self._file).st_ino or _is_restart(other, launch, restart):
            return True
        if other.boot == boot_id() != "" and other.flocked and flocked:
            return True  # the same kernel: only one process can have the flock
        return _is_dead(other, self.folder, self._file)

    def _refusal(self, other: Lease | None) -> str:
        process = str(other) if other else "another process"
        age = max(_age(self.folder, self._file), 0)
        return (
            f"{self.folder} is in use by {process} (last heartbeat {age:.0f} s ago; on another "
            f"host {STALE_SECONDS / 60:g} minutes without one free it): wait for it to end, stop "
            "it, or use another --out"
        )

    def _write(self) -> None:
        text = json.dumps(dataclasses.asdict(self.lease)).encode().ljust(_LEASE_BYTES)
        os.pwrite(self._file, text, 0)
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next one may work
                now = _read(self._file)
                if now and now.token != self.lease.token:
                    self.lost = True
                    return
                self._write()


def holder(folder: Path) -> str:
    """Name the process that writes to a run folder, by its lease; "" if there is none."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        lease = _read(file)
        if not lease or lease.inode != os.fstat(file).st_ino or _is_dead(lease, folder, file):
            return ""
        return str(lease)
    except OSError:
        return ""
    finally:
        os.close(file)


def _is_dead(lease: Lease, folder: Path, file: int) -> bool:
    """Whether the holder of a lease in an open file is gone."""
    if lease.boot == boot_id() != "" and lease.host == socket.gethostname() and lease.started:
        return _process_start(lease.pid) != lease.started
    return _age(folder, file) > STALE_SECONDS


def _age(folder: Path, file: int) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    return now - os.fstat(file).st_mtime


def _is_restart(other: Lease, launch: str, restart: int) -> bool:
    return bool(launch) and other.launch == launch and restart > 0 and other.restart <= restart


def _read(file: int) -> Lease | None:
    """Read a lease; None if the lock is free or the file is not a lease."""
    try:
        values = parse_json(os.pread(file, 2 * _LEASE_BYTES, 0), 1, 100)
        lease = Lease(**{f.name: values[f.name] for f in dataclasses.fields(Lease)})
    except (OSError, UserError, KeyError, TypeError):
        return None
    for field in dataclasses.fields(Lease):
        if type(getattr(lease, field.name)) is not field.type:
            return None
    lease.host = "".join(c if c.isprintable() else "?" for c in lease.host[:64])
    return lease


def _process_start(pid: int) -> int:
    """Return a process's start in clock ticks since boot; 0 if it is gone or cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return 0
