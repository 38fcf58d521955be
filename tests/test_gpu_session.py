"""A session's commands exist, and one that has no time or is cut off leaves a summary."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import kernels, train
from benchmarks.record import Record
from sid_fast.config.cli import presets

ROOT = Path(__file__).parents[1]
ROW = {"name": "x", "found": 1.0, "bound": 2.0, "seconds": 0.1, "note": "", "status": "pass"}
# Stands for Python on a machine with a GPU: keeps its command lines, and takes its time for one.
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
    -) cat >/dev/null ;;
    -c) [[ $2 == *cuda* ]] && echo 1 ;;
    -m)
        printf '%s\x1f' "${@:2}" >>"$CALLS" && echo >>"$CALLS"
        [[ $2 == "$SLOW" ]] && sleep 300
        true
        ;;
esac
"""


@pytest.fixture
def session(tmp_path):
    """session(seconds, slow) -> the process, in a group of its own, and what gives its calls."""
    started = []

    def start(seconds, slow=""):
        calls = tmp_path / "calls"
        calls.touch()
        for name, text in (("python", STAND_IN), ("cmake", "#!/bin/sh\nexit 1\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = {
            "PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "SLOW": slow,
            "PATH": f"{tmp_path}:/usr/bin:/bin",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [ROOT / "benchmarks" / "gpu_session.sh", tmp_path / "out", str(seconds)],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1], lambda: [
            line.split("\x1f")[:-1] for line in calls.read_text().splitlines()
        ]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_the_commands_of_a_session_are_those_that_there_are(session):
    process, calls = session(480)
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "kernels/csrc: exit status 1" in shown
    names = [name for name, *_ in calls()]
    order = "check kernels train breakdown train train kernels evaluation summary"
    assert names == ["pytest"] + [f"benchmarks.{name}" for name in order.split()]
    assert [file for file in calls()[0] if file.startswith("tests/")]
    assert all((ROOT / file).exists() for file in calls()[0] if file.startswith("tests/"))
    for name, *arguments in calls()[1:-1]:
        command = importlib.import_module(name).main
        given = command.make_context(name, arguments).params
        assert "BUDGET" not in "".join(arguments)
        if name == "benchmarks.train":
            assert train.chosen(given["variants"], train.VARIANTS, "variants")
            train.chosen(given["preset"], presets("train"), "preset")
        if name == "benchmarks.kernels":
            known = {"eager", "compile", "fused Adam", "apex", *kernels.BACKENDS}
            assert set(given["rivals"].split(",")) <= known


def test_a_session_that_is_cut_off_leaves_its_summary(session):
    """Its process group is sent SIGTERM; the part that ran is in a group of its own."""
    process, calls = session(480, slow="benchmarks.kernels")
    while not any(name == "benchmarks.kernels" for name, *_ in calls()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    shown = process.communicate(timeout=100)[0]  # which ends when nothing holds the pipe any more
    assert process.returncode == 128 + signal.SIGTERM
    assert "checks: done" in shown and "cut off after" in shown and "training" not in shown
    assert [name for name, *_ in calls()][-2:] == ["benchmarks.kernels", "benchmarks.summary"]


def test_a_session_without_time_leaves_a_summary(tmp_path):
    """The tree is imported through its links, and nothing in it is written to."""
    Record(tmp_path / "check.json", "check").add(**ROW)
    command = [ROOT / "benchmarks" / "gpu_session.sh", tmp_path, "5"]
    environment = os.environ | {"PYTHON": sys.executable, "SID_FAST_COMMIT": "abc"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "commit abc, 5 s" in found.stdout and "checks: no time left" in found.stdout
    assert "1 pass, 0 fail" in found.stdout
    assert (tmp_path / "session.log").read_text() in found.stdout
