"""Fixtures: where the recorded numbers are, the device of a kernel, and running a command."""

import importlib
import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once; child processes inherit it

import torch

if not torch.cuda.is_available():  # Triton kernels run in its interpreter; it reads this once
    os.environ["TRITON_INTERPRET"] = "1"

from sid_fast import cli
from sid_fast.data.datasets import write_dataset
from sid_fast.io import progress
from sid_fast.models.registry import save_network
from tests.helpers.detector import save_detector
from tests.helpers.golden import SHARED
from tests.helpers.images import pictures
from tests.helpers.networks import small_teacher


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # of pytest-xdist: no process ends long after the others
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available() and "SID_FAST_GPU_REHEARSAL" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the folder's name as well
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def silent_progress(monkeypatch):
    """No plain progress lines: how many there are depends on the machine."""
    monkeypatch.setattr(progress, "FIRST_PAUSE", 1e9)


@pytest.fixture
def poisoned():
    """Memory that is allocated without being initialised is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
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


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of SID_FAST_CACHE, empty."""
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def script(tmp_path_factory) -> Path:
    """A detector as a TorchScript file."""
    path = tmp_path_factory.mktemp("detector") / "toy.pt"
    save_detector(path)
    return path


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A small network as a file."""
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def real(tmp_path) -> Path:
    """A zip of 23 random images."""
    write_dataset(tmp_path / "real.zip", pictures(23))
    return tmp_path / "real.zip"
