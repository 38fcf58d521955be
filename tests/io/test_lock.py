"""A run folder has one writer."""

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from sid_fast.errors import UserError
from sid_fast.io import lock
from sid_fast.io.lock import NAME, RunLock

HOST = socket.gethostname()


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def lease_of(folder) -> dict:
    return json.loads((folder / NAME).read_bytes())


def write_lease(folder, **changes):
    """The lease of a process that is gone without releasing it."""
    with RunLock(folder) as held:
        values = dataclasses.asdict(held.lease) | changes
    (folder / NAME).write_text(json.dumps(values))


def test_a_second_writer_is_refused_and_told_the_holder(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on {HOST}"):
        RunLock(tmp_path)
    with RunLock(tmp_path):
        pass
    assert (tmp_path / NAME).read_bytes() == b""


def test_a_lease_alone_refuses_a_second_writer(tmp_path, no_flock):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on {HOST}"):
        RunLock(tmp_path)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("flock", [True, False])
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, request, flock):
    if not flock:
        request.getfixturevalue("no_flock")
    pid = os.fork()
    if not pid:
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert lease_of(tmp_path)["pid"] == pid
    with RunLock(tmp_path) as held:
        assert held.lease.pid == os.getpid()


def test_a_reused_process_id_is_not_the_holder(tmp_path, no_flock):
    write_lease(tmp_path, flocked=False, started=1)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(("age", "free"), [(10, False), (lock.STALE_SECONDS + 10, True)])
def test_another_host_holds_it_while_its_heart_beats(tmp_path, age, free):
    write_lease(tmp_path, host="elsewhere", boot="another")
    then = time.time() - age
    os.utime(tmp_path / NAME, (then, then))
    if free:
        with RunLock(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="on elsewhere"):
            RunLock(tmp_path)


def test_a_heartbeat_renews_the_lease_and_sees_that_it_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path) as held:
        os.utime(tmp_path / NAME, (1, 1))
        deadline = time.monotonic() + 60
        while (tmp_path / NAME).stat().st_mtime < 2:
            assert time.monotonic() < deadline
        assert not held.lost
        other = json.dumps(dataclasses.asdict(held.lease) | {"token": "another"}).encode()
        while not held.lost:  # a heartbeat may overwrite it
            with open(tmp_path / NAME, "r+b") as file:
                file.write(other.ljust(1024))
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert lease_of(tmp_path)["token"] == "another"


def test_a_restart_by_torchrun_takes_its_own_lock(tmp_path):
    write_lease(tmp_path, host="elsewhere", boot="another", launch="ours")
    for launch, restart in (("ours", 0), ("theirs", 1), ("", 1)):
        with pytest.raises(UserError, match="on elsewhere"):
            RunLock(tmp_path, launch, restart)
    with RunLock(tmp_path, "ours", 1):
        pass


def test_a_copied_folder_is_not_locked(tmp_path, no_flock):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with RunLock(tmp_path / "a"):
        (tmp_path / "b" / NAME).write_bytes((tmp_path / "a" / NAME).read_bytes())
        with RunLock(tmp_path / "b"):
            pass


@pytest.mark.parametrize("content", [b"\xff\0", b"[]", b'{"host": 7}', b"[" * 100_000])
def test_a_damaged_lock_file_locks_nothing(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with RunLock(tmp_path):
        pass


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    program = (
        "import os, sys, time, pathlib; from sid_fast.io.lock import RunLock\n"
        "held = RunLock(pathlib.Path(sys.argv[1]))\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if not child: os.write(write, b'x'), time.sleep(600)\n"
        "os.read(read, 1), print(child, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    child = int(done.stdout.readline())
    done.wait()
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        done.stdout.close()


def refused(folder, *restart):
    with pytest.raises(UserError, match="is in use by process"):
        RunLock(folder, *restart)


def test_a_process_of_another_host_name_is_not_looked_for_here(tmp_path, no_flock):
    """Containers share a kernel, but not their process ids: only the heartbeat says."""
    write_lease(tmp_path, flocked=False, host="elsewhere", started=1)
    refused(tmp_path)


def test_a_holder_whose_start_is_unknown_is_judged_by_its_heartbeat(tmp_path, no_flock):
    write_lease(tmp_path, flocked=False, started=0)
    refused(tmp_path)
    os.utime(tmp_path / NAME, (1, 1))
    with RunLock(tmp_path):
        pass


def test_a_holder_without_flock_is_not_gone_because_the_flock_is_free(tmp_path):
    write_lease(tmp_path, flocked=False)
    refused(tmp_path)


def test_the_age_of_a_heartbeat_is_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    write_lease(tmp_path, host="elsewhere", boot="another")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10**6)
    refused(tmp_path)


def test_a_killed_process_that_was_not_waited_for_holds_nothing(tmp_path, no_flock):
    pid = os.fork()
    if not pid:
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        deadline = time.monotonic() + 60
        while lock._process_start(pid):
            assert time.monotonic() < deadline
        with RunLock(tmp_path):
            pass
    finally:
        os.waitpid(pid, 0)


def test_a_restart_waits_for_its_own_former_process_and_for_no_other(tmp_path, monkeypatch):
    with RunLock(tmp_path, "ours", 1) as held:
        waited = []

        def sleep(seconds):
            waited.append(seconds)
            if len(waited) == 3:
                os.close(held._file)  # as its process ends
                held._file = -1
                held.lost = True

        monkeypatch.setattr(lock.time, "sleep", sleep)
        for launch, restart in (("theirs", 2), ("ours", 0), ("", 2)):
            refused(tmp_path, launch, restart)
        assert not waited
        with RunLock(tmp_path, "ours", 2):
            pass
        assert len(waited) == 3


def test_an_older_restart_does_not_take_the_lock_of_a_newer_one(tmp_path):
    write_lease(tmp_path, host="elsewhere", boot="another", launch="ours", restart=2)
    refused(tmp_path, "ours", 1)
    with RunLock(tmp_path, "ours", 2):
        pass


def test_the_holder_is_named_while_it_lives(tmp_path):
    assert lock.holder(tmp_path) == ""
    with RunLock(tmp_path):
        assert lock.holder(tmp_path) == f"process {os.getpid()} on {HOST}"
    assert lock.holder(tmp_path) == ""
    write_lease(tmp_path, started=1)
    assert lock.holder(tmp_path) == ""
    write_lease(tmp_path, host="elsewhere")
    assert lock.holder(tmp_path) == f"process {os.getpid()} on elsewhere"
    os.utime(tmp_path / NAME, (1, 1))
    assert lock.holder(tmp_path) == ""
    write_lease(tmp_path, inode=1)
    assert lock.holder(tmp_path) == ""
