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
