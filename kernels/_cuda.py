"""Load the CUDA C++ kernels of csrc, if CMake has built them."""

import ctypes
import functools
import sys
from pathlib import Path


def load(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and declare its functions' argument types."""
    lib = ctypes.CDLL(str(path))
    arguments: list[type[ctypes._SimpleCData]] = [ctypes.c_void_p] * 6
    arguments += [ctypes.c_int64, *[ctypes.c_double] * 4, ctypes.c_int]
    lib.sid_fast_adam_ema_host.argtypes = arguments
    lib.sid_fast_adam_ema_host.restype = None
    if hasattr(lib, "sid_fast_adam_ema_cuda"):
        lib.sid_fast_adam_ema_cuda.argtypes = [*arguments, ctypes.c_int, ctypes.c_void_p]
        lib.sid_fast_adam_ema_cuda.restype = ctypes.c_int
    return lib


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library installed with this package; None if CMake did not build it."""
    # An editable install leaves the library in site-packages, away from the sources.
    folders = [Path(__file__).parent, *(Path(p, "sid_fast", "kernels") for p in sys.path)]
    paths = (path for folder in folders for path in folder.glob("libsid_fast_kernels.*"))
    path = next(paths, None)
    return load(path) if path else None
