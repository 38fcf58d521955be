"""Files are written atomically."""

import contextlib
import os
import signal
import stat
import time

import pytest

from sid_fast.errors import UserError
from sid_fast.io import atomic
from sid_fast.io.atomic import atomic_path, open_target, remove_abandoned


def test_writes_the_file_and_leaves_nothing_else(tmp_path):
    with atomic_path(tmp_path / "a.bin") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("a.bin")
        assert temporary.suffix == ".tmp"
        temporary.write_bytes(b"new")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a.bin").write_bytes(b"old")

    def interrupted():
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_concurrent_writers_do_not_interfere(tmp_path):
    with atomic_path(tmp_path / "a.bin") as first, atomic_path(tmp_path / "a.bin") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "a.bin").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), real_replace(*a)))
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_refusals_name_the_target(tmp_path):
    def write(path, error):
        with atomic_path(path):
            raise error

    unreached = AssertionError("not reached")
    with pytest.raises(UserError, match=r"missing.*create the folder"):
        write(tmp_path / "missing" / "a.bin", unreached)
    with pytest.raises(UserError, match="is a folder"):
        write(tmp_path, unreached)
    with pytest.raises(UserError, match=r"a\.bin cannot be written \(No space left"):
        write(tmp_path / "a.bin", OSError(28, "No space left on device"))


def write(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.bin").write_text("old")
    for name in ("a.bin", "missing.bin"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        open_target(str(tmp_path / name))
        write(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "disk", "missing.bin"]


def test_only_regular_files_are_replaced(tmp_path):
    fifo, link, circle = (tmp_path / n for n in ("fifo", "link", "circle"))
    os.mkfifo(fifo)
    link.symlink_to(os.devnull)
    circle.symlink_to(circle)
    device = os.stat(os.devnull)
    for path in (fifo, link):
        for refused in (write, open_target):
            with pytest.raises(UserError, match="is a device, pipe or socket: give the name of a"):
                refused(str(path), *(["text"] * (refused is write)))
    with pytest.raises(UserError, match="circle cannot be written"):
        write(circle, "text")
    assert stat.S_ISFIFO(os.stat(fifo).st_mode)
    assert os.stat(os.devnull).st_ino == device.st_ino
    assert sorted(os.listdir(tmp_path)) == ["circle", "fifo", "link"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_old_file_and_no_temporary_one(tmp_path, number):
    (tmp_path / "a.bin").write_bytes(b"old")
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        with contextlib.suppress(KeyboardInterrupt), atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half of the n")
            os.kill(os.getpid(), number)
            time.sleep(60)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if number == signal.SIGINT else -number)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_the_handlers_of_signals_are_those_of_before(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(s) for s in numbers]
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "b") as second:
        first.touch()
        second.touch()
    assert [signal.getsignal(s) for s in numbers] == before


def killed_writer(path, number) -> str:
    """A process that dies by a signal while it writes to `path`: its temporary file's name."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            os.write(write, temporary.name.encode())
            os.kill(os.getpid(), number)
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with open(read) as name:
        return name.read()


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path):
    path = tmp_path / "a.bin"
    left = killed_writer(path, signal.SIGKILL)
    assert os.listdir(tmp_path) == [left]
    (tmp_path / "link").symlink_to(path)
    theirs = ["a.bin.tmp", "my.tmp", "b.bin.0123abcd.tmp", "link"]
    for name in theirs[:-1]:
        (tmp_path / name).touch()
    with atomic_path(path) as temporary:
        temporary.write_text("by another process")
        open_target(str(tmp_path / "link"))
        assert sorted(os.listdir(tmp_path)) == sorted([temporary.name, *theirs])
    assert path.read_text() == "by another process"


def test_temporary_files_of_other_machines_go_after_an_hour(tmp_path):
    tag = atomic._boot_tag()
    other = "0000" if tag != "0000" else "1111"
    names = [f"a.bin.{t}{n}.tmp" for t in (tag, other) for n in ("0000", "ffff")]
    for age, name in zip((0, 7200, 0, 7200), names, strict=True):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == [names[2]]


def test_no_temporary_file_is_removed_where_it_cannot_be_locked(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.touch()
        remove_abandoned(tmp_path)
        assert temporary.exists()


def test_a_temporary_name_that_is_taken_is_left_alone(tmp_path, monkeypatch):
    random = iter(["0000", "1111"])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda n: next(random))
    taken = atomic.temporary_name(tmp_path / "a.bin")
    taken.symlink_to(tmp_path / "theirs")
    random = iter(["0000", "1111"])
    with atomic_path(tmp_path / "a.bin") as temporary:
        assert temporary.name.endswith("1111.tmp")
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["a.bin", taken.name]


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, calls = atomic.fcntl.flock, []

    def flock(file, operation):
        if not calls:
            calls.extend(os.listdir(tmp_path))
            (tmp_path / calls[0]).unlink()
        real(file, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.bin").read_text() == "new"
    assert len(calls) == 1
