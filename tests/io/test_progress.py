"""Progress: a live line on a terminal, plain lines elsewhere, nothing with --quiet."""

import fcntl
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from sid_fast.io import progress, streams, terminal
from tests.helpers.processes import ENV


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    """A plain line at every look, and a look every few milliseconds."""
    monkeypatch.setattr(progress, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(progress, "LONGEST_PAUSE", 0.002)


@pytest.fixture
def live(monkeypatch):
    """A function that makes stderr a terminal; a fixture's own stderr would be pytest's again."""

    def start():
        for name in ("CI", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.002)
        monkeypatch.setattr(progress, "_width", lambda: 60)
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return start


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_file_gets_plain_lines_with_images_done_and_time_left(impatient, capsys):
    said = []
    with progress.phase("evaluation", 2000, "images") as shown:
        shown.began -= 10
        shown.updated = shown.began + 10  # however busy the machine is
        shown.done = 500
        until(lambda: said.append(capsys.readouterr().err) or "25 %" in "".join(said))
    text = "".join(said) + capsys.readouterr().err
    assert not set(text) & {"\r", "\x1b"}
    line = r"evaluation  25 %  ETA 00:(2\d|30)  500 of 2,000 images  50 images/s"
    assert re.search(f"^{line}$", text, re.MULTILINE), text
    assert re.search(r"\nevaluation: done in 00:1\d\n$", text), text


def test_short_work_leaves_no_line_in_a_file(capsys):
    with progress.phase("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_signal_handler_announces_through_the_display(monkeypatch, capsys):
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.002)
    progress.announce("nobody shows this")
    said = []
    with progress.phase("evaluation"):
        progress.announce("SIGINT: wait")
        until(lambda: said.append(capsys.readouterr().err) or "SIGINT" in "".join(said))
        progress.announce("too late")
    with progress.phase("another"):
        time.sleep(0.02)
    assert "".join(said) + capsys.readouterr().err == "SIGINT: wait\n"


def test_other_output_postpones_a_plain_line(monkeypatch, capsys):
    """A run that logs its steps needs no second voice."""
    monkeypatch.setattr(progress, "FIRST_PAUSE", 30.0)
    with progress.phase("training", 10, "kimg") as shown:
        shown.began -= 40
        streams.say("step 1")
        progress._display.show()
        assert capsys.readouterr().err == ""
        streams.last_output -= 40
        progress._display.show()
        assert capsys.readouterr().err.startswith("training")


def test_plain_lines_come_at_growing_intervals(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_PAUSE", 5.0)
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = progress._Display()
    display.open(progress.Phase("reading"))
    display.over.set()  # the test looks itself
    spoken = []
    for _ in range(200):
        now[0] += 1
        display.show()
        if capsys.readouterr().err:
            spoken.append(now[0] - 1000)
    assert spoken[:4] == [5, 15, 35, 65]
    assert {b - a for a, b in itertools.pairwise(spoken[3:])} == {30}


def test_a_terminal_gets_one_line_that_the_inner_phase_takes_over(live):
    live = live()
    with progress.phase("training", 30, "kimg") as shown:
        shown.details = lambda: ["8.1 it/s"]
        until(lambda: "training  0 %" in live.getvalue())
        with progress.phase("snapshot"):
            until(lambda: "snapshot  00:00" in live.getvalue())
        before = len(live.getvalue())
        until(lambda: "training" in live.getvalue()[before:])
        assert "8.1 it/s" in live.getvalue()[before:]
    assert "\n" not in live.getvalue()
    assert not live.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip(), "it is erased"
    assert "done in" not in live.getvalue()


def test_lines_are_printed_above_the_live_one(live, monkeypatch):
    live = live()
    monkeypatch.setattr(sys, "stdout", live)  # one terminal
    with progress.phase("training"):
        until(lambda: "training" in live.getvalue())
        streams.say("a note")
    text = live.getvalue()
    assert re.search(r"\r +\ra note\n", text), text


def test_what_does_not_fit_the_width_is_left_out_whole():
    parts = ["training", "41 %", "ETA 01:10", "12.30 of 30.00 kimg", "8.1 it/s"]
    assert progress.fit(parts, 200) == "  ".join(parts)
    assert progress.fit(parts, 39) == "training  41 %  ETA 01:10"
    assert progress.fit(parts, 5) == "train"
    assert progress.fit(["服装", "41 %"], 9) == "服装", "two columns a character"
    assert progress.Phase("a\x1b[2Jb").parts()[0] == "a\ufffd[2Jb"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TERM", "xterm-256color", True),
        ("TERM", "dumb", False),
        ("TERM", "", False),
        ("NO_COLOR", "1", False),
        ("NO_COLOR", "", True),
        ("CI", "true", False),
        ("CI", "false", True),
    ],
)
def test_what_counts_as_a_terminal(live, monkeypatch, name, value, expected):
    live()
    monkeypatch.setenv(name, value)
    assert terminal.is_live() == expected


def test_a_pipe_is_no_terminal(live, monkeypatch):
    live()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not terminal.is_live()


@pytest.mark.parametrize("why", ["quiet", "rank"])
def test_nothing_is_shown_with_quiet_and_on_other_ranks(why, live, monkeypatch):
    live = live()
    if why == "quiet":
        monkeypatch.setattr(streams, "quiet", True)
        streams.note("a note")
    else:
        monkeypatch.setenv("RANK", "1")
    with progress.phase("training"):
        assert not progress._display.phases
    assert live.getvalue() == ""


def test_parts_of_a_batch_count_before_it_is_complete():
    with progress.phase("generating", 1000, "images") as shown:
        progress.ahead(150.5)
        assert shown.parts()[3] == "150 of 1,000 images"
        shown.update(512)
        assert shown.parts()[3] == "512 of 1,000 images"


def test_an_estimate_from_outside_counts_down():
    phase = progress.Phase("training", 30.0, "kimg")
    phase.left = 100.0, time.monotonic() - 40
    assert "ETA 01:00" in phase.parts() or "ETA 00:59" in phase.parts()


def test_a_pause_is_no_part_of_the_rate_and_the_estimate(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    phase = progress.Phase("training", 30.0, "kimg")
    now = 110.0
    phase.update(10)
    with phase.paused():
        now += 600
    assert phase.parts()[2:] == ["ETA 00:20", "10 of 30.00 kimg", "1 kimg/s"]
    phase.left = 20.0, now
    with phase.paused():  # an evaluation that is longer than what remains
        now += 600
    now += 5
    assert "ETA 00:15" in phase.parts()


def test_track_counts_items_and_a_failure_is_not_done(impatient, capsys):
    def items():
        yield 1
        until(lambda: progress._display.spoken)
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        list(progress.track(items(), "reading", "files", 5))
    assert "done in" not in capsys.readouterr().err
    assert not progress._display.phases


PROGRAM = """
import sys, time
from sid_fast.io import progress, streams
progress.REDRAW_SECONDS = 0.01
streams.make_safe()
with progress.phase("evaluation of the network", 50_000, "images") as shown:
    for _ in range(20):
        shown.update(1000)
        time.sleep(0.01)
    streams.say("a line")
"""


@pytest.mark.slow
def test_lines_never_exceed_a_narrow_terminal():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    env = {k: v for k, v in ENV.items() if k not in ("CI", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            text += os.read(ours, 4096)
        except OSError:  # closed
            break
    os.close(ours)
    assert process.wait(60) == 0
    drawn = re.split("[\r\n]+", re.sub(r"\x1b\[\d*[Km]", "", text.decode()))
    assert max(map(len, drawn)) <= 40
    assert any(re.match(r"evaluation of the network  \d+ %", line) for line in drawn), drawn
    assert "a line" in drawn


def test_a_terminal_that_does_not_know_its_size_shows_the_line(monkeypatch):
    ours, theirs = os.openpty()  # 0 rows of 0 columns
    for name in ("CI", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress.phase("evaluation of the teacher", 50_000, "images"):
            pass
        monkeypatch.undo()
        print("end", file=stderr, flush=True)
        text = b""
        while b"end" not in text:
            text += os.read(ours, 4096)
    os.close(ours)
    assert b"evaluation of the teacher  0 %" in text


@pytest.mark.parametrize("live", [True, False])
def test_the_live_line_replaces_lines_of_the_same_terminal_only(monkeypatch, live):
    monkeypatch.setattr(terminal, "is_live", lambda: live)
    for stdout in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert terminal.replaces_lines() == (live and stdout.isatty())


def test_the_last_column_stays_free(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.delenv("COLUMNS", raising=False)
    for columns, width in ((80, 79), (1, 1), (0, 79)):
        monkeypatch.setattr(os, "get_terminal_size", lambda _, n=columns: os.terminal_size((n, 24)))
        assert progress._width() == width


@pytest.mark.parametrize(
    ("module", "argument", "rank", "told"),
    [
        ("sid_fast.train", "--kimg=1", "0", "loading PyTorch …"),
        ("sid_fast.train", "--quiet", "0", ""),
        ("sid_fast.train", "-q", "0", ""),
        ("sid_fast.train", "--kimg=1", "1", ""),
        ("pytest", "--kimg=1", "0", ""),
    ],
)
def test_loading_is_announced_until_it_is_over(monkeypatch, capsys, module, argument, rank, told):
    monkeypatch.setattr(terminal, "is_live", lambda: True)
    monkeypatch.setattr(terminal, "_announced", False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module, argument])
    monkeypatch.setattr(sys, "argv", ["x", argument])
    monkeypatch.setenv("RANK", rank)
    terminal.announce_loading()
    assert capsys.readouterr().err == told
    terminal.loaded()
    assert capsys.readouterr().err == (f"\r{terminal.ERASE_LINE}" if told else "")
