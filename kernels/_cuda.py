"""Load the CUDA C++ kernels of csrc, if CMake has built them."""

import ctypes
import functools
import sys
from pathlib import Path

INTERFACE = 3  # of csrc/interface.h


def load(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and declare its functions' argument types."""
    lib = ctypes.CDLL(str(path))
    arguments: list[type[ctypes._SimpleCData]] = [ctypes.c_void_p] * 6
    arguments += [ctypes.c_int64, *[ctypes.c_double] * 4, ctypes.c_int]
    lib.sid_fast_adam_ema_host.argtypes = arguments
    lib.sid_fast_adam_ema_host.restype = None
    # Structures of kernels/group_norm/host.py, tensors, threads.
    pointers: list[type[ctypes._SimpleCData]] = [ctypes.c_void_p] * 3
    for name in ("group_norm", "group_norm_backward"):
        function = getattr(lib, f"sid_fast_{name}_host")
        function.argtypes, function.restype = [*pointers, ctypes.c_int], None
    if hasattr(lib, "sid_fast_adam_ema_cuda"):
        lib.sid_fast_adam_ema_cuda.argtypes = [*arguments, ctypes.c_int, ctypes.c_void_p]
        lib.sid_fast_adam_ema_cuda.restype = ctypes.c_int
    return lib


def is_current(path: Path) -> bool:
    """Whether the library at `path` was built from these sources' interface, not an older one."""
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "sid_fast_interface").value == INTERFACE
    except ValueError:  # it has none
        return False


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library installed with this package; None if CMake did not build it.

    An editable install keeps the library of its installation: one with another interface counts as
    not built.
    """
    # An editable install leaves the library in site-packages, away from the sources.
    folders = [Path(__file__).parent, *(Path(p, "sid_fast", "kernels") for p in sys.path)]
    paths = (path for folder in folders for path in folder.glob("libsid_fast_kernels.*"))
    path = next(paths, None)
    return load(path) if path and is_current(path) else None


def is_built() -> bool:
    """Return whether `library` finds one."""
    return library() is not None


# As torch.compiler.assume_constant_result marks it, since torch.compile cannot trace a search for
# files; that function would import the compiler whenever this package is imported.
is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]
