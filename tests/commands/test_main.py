"""python -m sid_fast, and how a command starts and reports what libraries raise."""

import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading

import click
import pytest
import torch

from sid_fast import __main__, cli
from sid_fast.io import invocation, streams
from sid_fast.tools import estimator
from tests.helpers.networks import SMALL
from tests.helpers.processes import ENV, ROOT, python


@pytest.mark.slow
def test_the_first_argument_is_a_command():
    done = python("-m", "sid_fast", "train", "--preset", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: preset 'none' is unknown: choose from")
    done = python("-m", "sid_fast", "trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'trian' is not a command: did you mean train? All comm")
    assert done.stderr.count("\n") == 1
    done = python("-m", "sid_fast", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m sid_fast.train " in done.stdout


@pytest.mark.filterwarnings("ignore:'sid_fast.generate' found in sys.modules:RuntimeWarning")
def test_the_installed_command_speaks_of_itself_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr(invocation, "script", False)
    arguments = pytest.MonkeyPatch()

    def run(*words):
        arguments.setattr(sys, "argv", ["/usr/bin/sid-fast", *words])
        status = 0
        try:
            __main__.script()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    status, listed, _ = run("--help")
    assert status == 0
    for name in __main__.COMMANDS:
        assert re.search(rf"^  sid-fast {name} +\w+", listed, re.MULTILINE), name
    assert "python -m" not in listed
    assert run() == (0, listed, "")
    status, shown, _ = run("generate", "--help")
    assert shown.startswith("Usage: sid-fast generate [OPTIONS]")
    assert "sid-fast generate --network runs/000-digits" in shown
    status, _, error = run("generate", "--sede", "3")
    assert status == 2
    assert error.count("\n") == 1
    assert "sid-fast generate --help" in error
    assert run("evalute")[2].startswith("error: 'evalute' is not a command: did you mean evaluate?")
    assert run("xyz")[2].startswith("error: 'xyz' is not a command: choose from train")
    arguments.undo()


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_lists_its_options(name):
    command = importlib.import_module(f"sid_fast.{name}").main
    shown = command.get_help(click.Context(command, info_name=name))
    assert re.search(rf"^  python -m sid_fast\.{name} ", shown, re.MULTILINE), "a line to copy"
    assert "--quiet" in shown


def test_the_console_script_is_the_tested_function():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nsid-fast = "sid_fast.__main__:script"\n' in text


@pytest.mark.parametrize(
    ("executable", "on_path", "called"),
    [
        ("{0}/bin/python3", "{0}/bin/python", "python"),
        ("{0}/.venv/bin/python", "/usr/bin/python", ".venv/bin/python"),
        ("/opt/a b/bin/python", None, "'/opt/a b/bin/python'"),
    ],
)
def test_the_next_command_names_a_python_that_works(
    tmp_path, monkeypatch, executable, on_path, called
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", executable.format(tmp_path))
    monkeypatch.setattr(
        invocation.shutil, "which", lambda name: on_path and on_path.format(tmp_path)
    )
    line = invocation.command_line("generate", "--network", "a run", "--steps", 18)
    assert line == f"{called} -m sid_fast.generate --network 'a run' --steps 18"
    monkeypatch.setattr(invocation, "script", True)
    assert invocation.command_line("tune") == "sid-fast tune"


@pytest.mark.slow
def test_the_age_of_the_process_includes_its_imports():
    done = python(
        "-c", "import time; time.sleep(1); from sid_fast.io import invocation as i;"
        "print(time.monotonic() - i.started(), time.monotonic() - i._imported)",
    )  # fmt: skip
    age, imported = map(float, done.stdout.split())
    assert 1 < age < 100
    assert imported < age


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


def test_a_gpu_out_of_memory_is_one_line(monkeypatch, capsys):
    @click.command()
    def command():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
        )

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(command, "x")
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB: use a smaller")
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


def test_next_commands_are_not_for_quiet_runs(monkeypatch, capsys):
    for quiet, told in ((False, "next: a\nnext:\n  b\n  c\n"), (True, "")):
        monkeypatch.setattr(streams, "quiet", quiet)
        invocation.suggest("a")
        invocation.suggest("b", "c")
        invocation.suggest()
        assert capsys.readouterr().out == told


@pytest.mark.skipif(os.getpid() == 1, reason="process 1 cannot be its own parent")
def test_a_job_of_torchrun_is_as_old_as_torchrun(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    own = invocation.started()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert invocation.started() < own
