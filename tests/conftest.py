"""Fixtures: where the recorded numbers and real images are, and how tensors are compared."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("SID_FAST_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the published implementation."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no golden data; set SID_FAST_SHARED to the folder that holds golden/")
    return SHARED / "golden"
