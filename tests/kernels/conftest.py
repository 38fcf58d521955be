"""The library of kernels/csrc, for the tests of its kernels."""

import shutil

import pytest

from sid_fast.kernels import _cuda
from tests.helpers.library import build


@pytest.fixture(scope="session")
def library(tmp_path_factory, device):
    """The CUDA C++ library: the installed one on a GPU machine, else a CPU build by CMake."""
    if device.type == "cuda":
        return _cuda.library() or pytest.skip("the installed package has no CUDA library")
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no CMake or no C++ compiler")
    return _cuda.load(build(tmp_path_factory.mktemp("host"), "-DCMAKE_CUDA_COMPILER=NOTFOUND"))
