"""The library of CUDA C++ kernels in csrc, where CMake has built one."""

import ctypes
import functools
import sys
from pathlib import Path


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, with the types of its functions declared."""
    found = ctypes.CDLL(str(path))
    arguments: list[type[ctypes._SimpleCData]] = [ctypes.c_void_p] * 6
    arguments += [ctypes.c_int64, *[ctypes.c_double] * 3, ctypes.c_int]
    found.sid_fast_adam_ema_host.argtypes = arguments
    found.sid_fast_adam_ema_host.restype = None
    if hasattr(found, "sid_fast_adam_ema_cuda"):
        found.sid_fast_adam_ema_cuda.argtypes = [*arguments, ctypes.c_int, ctypes.c_void_p]
        found.sid_fast_adam_ema_cuda.restype = ctypes.c_int
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """What CMake built of csrc and installed beside this package; None where it built nothing."""
    # An editable install keeps what was built in site-packages, away from the sources.
    folders = [Path(__file__).parent, *(Path(p, "sid_fast", "kernels") for p in sys.path)]
    paths = (path for folder in folders for path in folder.glob("libsid_fast_kernels.*"))
    path = next(paths, None)
    return load(path) if path else None
