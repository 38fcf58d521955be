"""Building the library of kernels/csrc with CMake."""

import subprocess
from pathlib import Path

from sid_fast.kernels import _cuda


def build(folder: Path, *options: str) -> Path:
    """Configure and build in a folder; returns the library's path."""
    source = Path(_cuda.__file__).resolve().parents[1]
    for command in (["-S", source, "-B", folder, *options], ["--build", folder]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("libsid_fast_kernels.*"))
