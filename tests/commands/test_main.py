"""python -m sid_fast, and how a command starts and reports what libraries raise."""

import logging
import os
import signal
import subprocess
import sys
import threading

import click
import pytest

from sid_fast import cli
from sid_fast.tools import estimator
from tests.helpers.networks import SMALL
from tests.helpers.processes import ENV, python


def test_the_first_argument_is_a_command():
    done = python("-m", "sid_fast", "train", "--preset", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: preset 'none' is unknown: choose from")
    done = python("-m", "sid_fast", "trian")
    assert done.returncode == 2
    assert done.stderr == (
        "error: 'trian' is not a command: choose from train, plan, tune, generate, evaluate, "
        "pretrain, prepare\n"
    )
    done = python("-m", "sid_fast", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m sid_fast.train " in done.stdout


def test_ctrl_c_during_the_imports_has_no_traceback(tmp_path):
    """A module that the command imports sends the signal, as a user would in that second."""
    (tmp_path / "tqdm.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    env = ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENV['PYTHONPATH']}"}
    env["PYTHONPATH"] += os.pathsep + os.pathsep.join(p for p in sys.path if "site-packages" in p)
    command = [sys.executable, "-m", "sid_fast.train", "--help"]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_in_a_command_is_one_line(monkeypatch, capsys):
    @click.command()
    def command():
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["x"])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as sid_fast/__init__.py leaves it
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command, "x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def failing_thread():
    raise OSError("the disk is full")


def test_tracebacks_of_libraries_are_not_shown(monkeypatch, capsys):
    """TensorBoard's writer thread dies, PyTorch logs an exception, and both raise it again."""

    @click.command()
    def command():
        thread = threading.Thread(target=failing_thread)
        thread.start()
        thread.join()
        record = logging.LogRecord(
            "torch", 30, "", 0, "no metadata", (), (OSError, OSError(), None)
        )
        logging.lastResort.handle(record)
        raise cli.UserError("the state is \x1b[31mdamaged\n")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit):
        cli.main(command, "x")
    assert capsys.readouterr().err == "error: the state is \ufffd[31mdamaged\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_a_cpu_out_of_memory_is_one_line(monkeypatch, capsys, error):
    @click.command()
    def command():
        raise error

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(command, "x")
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory on the CPU: use a smaller batch")
    assert told.count("\n") == 1


@pytest.mark.slow
def test_the_least_memory_is_below_the_counted_and_not_by_much():
    """A lower bound, so that nothing that fits is refused."""
    counts = estimator.counts(SMALL, estimator.Settings(precision="fp32"), backends="eager")
    for images in (1, 1000):
        counted = counts.memory(images).total() - estimator.ALLOWANCE
        assert counted / 10 < estimator.least_bytes(SMALL, images) <= counted


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["-m", "sid_fast.plan", "--help"], None, "ERROR"),
        (["-m", "sid_fast.plan", "--help"], "INFO", "INFO"),
        (["-c", "import sid_fast"], None, None),
    ],
)
def test_a_command_asks_torch_for_errors_only(tmp_path, arguments, given, expected):
    """Before torch reads the variable; a user's own choice and other programs keep theirs."""
    (tmp_path / "torch.py").write_text(
        "import os; os.write(1, repr(os.environ.get('TORCH_CPP_LOG_LEVEL')).encode()), os._exit(0)"
    )
    env = ENV | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ENV["PYTHONPATH"]])}
    env.pop("TORCH_CPP_LOG_LEVEL", None)
    env |= {"TORCH_CPP_LOG_LEVEL": given} if given else {}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == repr(expected)
