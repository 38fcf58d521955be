"""The acceptance run: its commands are valid and ordered by value, and it always ends orderly."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import kernels, train
from sid_fast.cli import presets

ROOT = Path(__file__).parents[2]
# Replaces Python on a machine with a GPU: logs its command lines, and hangs in one of them.
STAND_IN = r"""#!/usr/bin/env bash
case $1 in
    -) cat >/dev/null ;;
    -c) [[ $2 == *cuda* ]] && echo 1 ;;
    -m)
        printf '%s\x1f' "${@:2}" >>"$CALLS" && echo >>"$CALLS"
        [[ "$*" == *"$SLOW"* && $SLOW ]] && sleep 300
        true
        ;;
esac
"""


@pytest.fixture
def session(tmp_path):
    """session(seconds, slow) -> the process, in its own group, and a function listing its calls."""
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
            line.split("\x1f")[:-1]
            for line in calls.read_text().splitlines(keepends=True)
            if line.endswith("\n")  # the last one may be half written
        ]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.slow
def test_the_commands_are_valid_and_ordered_by_value(session):
    process, calls = session(480)
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 0
    assert "kernels/csrc: exit status 1" in shown
    made = [tuple(call) for call in calls() if "--compile-only" not in call]
    parts = [call for call in calls() if "--compile-only" in call]
    assert len(parts) == int(parts[0][parts[0].index("--parts") + 1]), "one process for each part"
    checks = [args[-1] for name, *args in made if "tests/gpu/test_acceptance.py" in args]
    units = [args[-1] for name, *args in made if name == "pytest" and args[-2:-1] == ["addopts="]]
    assert len(units) > 4
    assert all((ROOT / file).exists() for file in units)
    order = [name.removeprefix("benchmarks.") for name, *args in made if args[-1] not in units]
    expected = (
        "pytest train pytest train pytest pytest kernels train analysis.breakdown train pytest "
        "train pytest kernels evaluation report"
    )
    assert order == expected.split()
    variants = []
    for name, *arguments in made:
        if name in ("pytest", "benchmarks.report"):
            continue
        given = importlib.import_module(name).main.make_context(name, [*arguments]).params
        assert "BUDGET" not in "".join(arguments)
        if name == "benchmarks.train":
            variants.append(train.parse_list(given["variants"], train.VARIANTS, "variants"))
            train.parse_list(given["preset"], presets("train"), "preset")
        if name == "benchmarks.kernels":
            known = {"eager", kernels.NCHW, "compile", "fused Adam", "apex", *kernels.BACKENDS}
            assert set(given["baselines"].split(",")) <= known
    # The default backend is checked and timed first, and no check is left out.
    assert checks[0] == "test_step and default"
    assert variants[0][0] == "default"
    assert "sid_fast" not in variants[0]
    assert _selected(" or ".join(f"({keywords})" for keywords in checks)) == _selected("")
    assert all(map(_selected, checks))


def _selected(keywords):
    """Acceptance checks that `-k keywords` selects, collected in this process."""
    names = set()

    class Collector:
        def pytest_collection_finish(self, session):
            names.update(item.name for item in session.items)

    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-k", keywords]
    pytest.main([*options, str(ROOT / "tests/gpu/test_acceptance.py")], plugins=[Collector()])
    return names


def test_an_interrupted_run_prints_its_summary(session):
    """SIGTERM goes to the script's process group; `timeout` puts the running part in its own."""
    process, calls = session(480, slow="benchmarks.kernels --seconds")
    while not any("--baselines" in call for call in calls()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    shown = process.communicate(timeout=100)[0]  # returns when no process holds the pipe
    assert process.returncode == 128 + signal.SIGTERM
    assert "checks of the default: done" in shown
    assert "cut off after" in shown
    assert "breakdown" not in shown
    assert [name for name, *_ in calls()][-2:] == ["benchmarks.kernels", "benchmarks.report"]


def test_an_interrupted_run_stops_the_background_compilation(session):
    process, calls = session(480, slow="--compile-only")
    while not any("tests/gpu/test_acceptance.py" in call for call in calls()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_run_without_time_prints_a_summary(tmp_path):
    """It imports the tree through links and writes nothing into it."""
    command = [ROOT / "benchmarks" / "gpu_acceptance.sh", tmp_path, "5"]
    environment = os.environ | {"PYTHON": sys.executable, "SID_FAST_COMMIT": "abc"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "commit abc, 5 s" in done.stdout
    assert "checks of the default: no time left" in done.stdout
    assert "README.md: 0 result files" in done.stdout
    assert (tmp_path / "acceptance.log").read_text() in done.stdout
