"""The acceptance run: its commands exist, in order of value, and its end is always orderly."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import check, kernels, train
from benchmarks.record import Record
from sid_fast.cli import presets

ROOT = Path(__file__).parents[2]
ROW = {"name": "x", "found": 1.0, "bound": 2.0, "seconds": 0.1, "note": "", "status": "pass"}
# Stands for Python on a machine with a GPU: keeps its command lines, and takes its time for one.
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
    -) cat >/dev/null ;;
    -c) [[ $2 == *cuda* ]] && echo 1 ;; # without xdist
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
                [ROOT / "benchmarks" / "gpu_acceptance.sh", tmp_path / "out", str(seconds)],
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


def test_the_commands_are_those_that_there_are_in_order_of_value(session):
    process, calls = session(480)
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 0
    assert "kernels/csrc: exit status 1" in shown
    made = [(name, *rest) for name, *rest in calls() if name != "benchmarks.warm_up"]
    assert len(made) == len(calls()) - 1, "kernels compile in the background, once"
    order = (
        "check train check train check spread kernels train breakdown train check train kernels "
        "evaluation summary"
    )
    assert [name for name, *_ in made] == [f"benchmarks.{name}" for name in order.split()]
    spread = next(rest for name, *rest in made if name == "benchmarks.spread")
    files = [file for file in spread if file.startswith("tests/")]
    assert int(spread[0]) > 0
    assert files
    assert all((ROOT / file).exists() for file in files)
    only, variants = [], []
    for name, *arguments in made[:-1]:
        if name == "benchmarks.spread":
            continue
        command = importlib.import_module(name).main
        given = command.make_context(name, arguments).params
        assert "BUDGET" not in "".join(arguments)
        if name == "benchmarks.check":
            only.append(given["only"])
        if name == "benchmarks.train":
            variants.append(train.chosen(given["variants"], train.VARIANTS, "variants"))
            train.chosen(given["preset"], presets("train"), "preset")
        if name == "benchmarks.kernels":
            known = {"eager", kernels.NCHW, "compile", "fused Adam", "apex", *kernels.BACKENDS}
            assert set(given["rivals"].split(",")) <= known
    # What a user gets is checked and timed first, and no check is left out.
    assert only[0] == "default: "
    assert variants[0][0] == "default"
    assert "ours" not in variants[0]
    parts = [[name for name in check.CHECKS if which in name] for which in only]
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == sorted(check.CHECKS)


def test_a_session_that_is_cut_off_leaves_its_summary(session):
    """Its process group is sent SIGTERM; the part that ran is in a group of its own."""
    process, calls = session(480, slow="benchmarks.kernels")
    while not any(name == "benchmarks.kernels" for name, *_ in calls()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    shown = process.communicate(timeout=100)[0]  # which ends when nothing holds the pipe any more
    assert process.returncode == 128 + signal.SIGTERM
    assert "checks of the default: done" in shown
    assert "cut off after" in shown
    assert "breakdown" not in shown
    assert [name for name, *_ in calls()][-2:] == ["benchmarks.kernels", "benchmarks.summary"]


def test_what_compiles_in_the_background_ends_with_a_run_that_is_cut_off(session):
    process, calls = session(480, slow="benchmarks.warm_up")
    while not any(name == "benchmarks.check" for name, *_ in calls()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_session_without_time_leaves_a_summary(tmp_path):
    """The tree is imported through its links, and nothing in it is written to."""
    Record(tmp_path / "other.json", "check").add(**ROW)
    command = [ROOT / "benchmarks" / "gpu_acceptance.sh", tmp_path, "5"]
    environment = os.environ | {"PYTHON": sys.executable, "SID_FAST_COMMIT": "abc"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "commit abc, 5 s" in found.stdout
    assert "checks of the default: no time left" in found.stdout
    assert "1 pass, 0 fail" in found.stdout
    assert (tmp_path / "acceptance.log").read_text() in found.stdout
