"""Fixtures: where the recorded numbers are, the device of a kernel, and running a command."""

import os

import torch

if not torch.cuda.is_available():  # has to be known before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import importlib
import sys
from pathlib import Path

import pytest

if not torch.cuda.is_available():  # Triton kernels run in its interpreter; it reads this once
    os.environ["TRITON_INTERPRET"] = "1"

from sid_fast import cli
from tests.helpers.golden import SHARED


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and "SID_FAST_GPU_REHEARSAL" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the folder's name as well
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def poisoned():
    """Memory that is allocated without being initialised is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the published implementation."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no golden data; set SID_FAST_SHARED to the folder that holds golden/")
    return SHARED / "golden"


@pytest.fixture
def run_command(monkeypatch, capsys):
    """run_command("train", "--alpha", 7) -> (exit status, stderr), in this process."""

    def run(name: str, *arguments: object) -> tuple[int, str]:
        module = importlib.import_module(f"sid_fast.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main(module.main, f"sid_fast.{name}")
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run
