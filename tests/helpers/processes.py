"""Starting sid_fast in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def python(*arguments: object) -> subprocess.CompletedProcess:
    """Run python with these arguments to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=900)


def python_until(ready: Callable[[], bool], send: signal.Signals, *arguments: object) -> int:
    """Run python until `ready`, send it a signal, and return its exit status."""
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, "it ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(send)
    return process.wait(300)


def tensors_of(state: Path) -> dict:
    """The tensors of a state that one process wrote."""
    files = [load_file(path) for path in sorted(state.glob("*.safetensors"))]
    return {name.removeprefix("state."): tensor for file in files for name, tensor in file.items()}


def python_without_stdout(stdout: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run python with a stdout that is "closed", on a "full" disk, or a pipe of a "reader gone"."""
    command = [sys.executable, *map(str, arguments)]
    if stdout == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    reader, writer = os.pipe()
    os.close(reader)
    target = os.open("/dev/full", os.O_WRONLY) if stdout == "full" else writer
    try:
        return subprocess.run(
            command, env=ENV, stdout=target, stderr=subprocess.PIPE, text=True, timeout=300
        )
    finally:
        os.close(writer)
        if target != writer:
            os.close(target)
