"""NVIDIA's apex, where it is installed: its group norm, in the forms that it has.

PyPI's `apex` is an unrelated package. It is told apart by what NVIDIA's is made of, and nothing
of it is imported to find out: `import apex` would already run a stranger's code.

Its FusedAdam does not stand in for adam_ema: it neither cleans gradients nor keeps the average,
writes no channels-last copy, and skips an update by a loss scaler's flag only, so that four more
passes over the weights would surround it; and it wants a first moment even where β1 = 0.
"""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

FILES = ("contrib/group_norm/group_norm.py", "optimizers/fused_adam.py")
EXTENSION = "group_norm_cuda"  # compiled beside the package, only where its build was asked to


def installed() -> bool:
    """Whether `import apex` would find NVIDIA's, built with its group norm."""
    try:  # the spec of a name without a dot is found without importing anything
        package, extension = map(importlib.util.find_spec, ("apex", EXTENSION))
    except ValueError:  # something else already poses as one of them in sys.modules
        return False
    folders = package and package.submodule_search_locations
    if not folders or extension is None:
        return False
    return all(Path(next(iter(folders)), file).is_file() for file in FILES)


@functools.cache
def _module() -> ModuleType:
    if not installed():
        raise RuntimeError("apex: NVIDIA's, built with its group norm, is not installed")
    return importlib.import_module("apex.contrib.group_norm.group_norm")


def takes(x: torch.Tensor, groups: int) -> bool:
    """Whether apex's kernels have been made for these channels, on a GPU and channels-last."""
    known = _module().GroupNorm
    return (
        x.is_cuda
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] in known.SUPPORTED_CHANNELS
        and groups in known.SUPPORTED_GROUPS
    )


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """norm(x) or silu(norm(x)) of what `takes` says; nothing may be added, scaled or resampled.

    x is [N, C, H, W], float32 or 16 bit; its gradient must come back channels-last.
    """
    passes = "one" if x.shape[2] * x.shape[3] <= 1024 else "two"  # apex's own rule, from an A100 on
    function = getattr(_module(), f"cuda_group_norm_nhwc_{passes}_pass")
    return function(x, groups, weight, bias, eps, "silu" if silu else "")
