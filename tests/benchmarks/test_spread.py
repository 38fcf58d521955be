"""Tests spread over processes: all of them once, and every failure is told."""

import signal
import subprocess
import sys
import time

from tests.helpers.processes import ENV

PASSES = (
    "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_of(n): assert n != {bad}\n"
)


def spread(folder, files, processes=2):
    (folder / "tests").mkdir()
    for name, text in files.items():
        (folder / "tests" / name).write_text(text)
    command = [sys.executable, "-m", "benchmarks.spread", processes, "-p", "no:cacheprovider"]
    command += ["-q", f"--rootdir={folder}", *(f"tests/{name}" for name in files)]
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=ENV,
        # A shell starts background jobs, and so perhaps these tests, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_each_runs_once_and_failures_are_told(tmp_path):
    process = spread(
        tmp_path, {"test_a.py": PASSES.format(bad=3), "test_b.py": PASSES.format(bad=9)}
    )
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 1, shown
    assert "10 tests in 2 processes, 1 of which failed" in shown
    assert "FAILED tests/test_a.py::test_of[3]" in shown
    assert "1 failed, 4 passed" in shown
    assert "5 passed" in shown


def test_what_cannot_be_collected_is_an_error(tmp_path):
    process = spread(tmp_path, {"test_a.py": "import nothing_of_the_kind"})
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    assert "could not collect" in shown
    assert "nothing_of" in shown


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    text = "import pathlib, time\ndef test_a(): pass\ndef test_b(): pass\n"
    text += "def test_c(): pathlib.Path('at-it').touch(); time.sleep(100)\n"
    process = spread(tmp_path, {"test_a.py": text}, 1)
    while not (tmp_path / "at-it").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in (*children.stdout.split(), str(process.pid)):  # as a terminal does
        subprocess.run(["kill", f"-{int(signal.SIGINT)}", pid], check=True)
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 130
    assert "2 passed" in shown
